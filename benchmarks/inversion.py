"""The gradient of inversion matching beside that of the diffusion loss, by timestep, as JSON (docs/inversion-matching.md).

    python benchmarks/inversion.py                                the embedded generator and images
    python benchmarks/inversion.py bands=4 batches=4              coarser and faster
    python benchmarks/inversion.py figure=gradients.svg           and a figure
    python benchmarks/inversion.py generator=FILE data.path=FOLDER data.size=32 data.channels=3

The range of timesteps is divided into bands. In each band the same batches of training images, with the same noise, give the
gradients of L_Diff and of L_IM with respect to the parameters that are fine-tuned, for every number of inversion steps N and of
steps with gradient. A batch's gradient is the mean gradient, which all batches have in common, and noise:

    loss      mean of the loss over batches
    floor     the lowest value that L_IM can have: that of an inverted latent which is parallel to the clean latent z_0
    parallel  mean cosine between the inverted latent and z_0
    length    norm of a batch's gradient (root of the mean square)
    mean      norm of the mean gradient, estimated from pairs of different batches; 0 where the estimate is negative. With few
              batches a small share of `length` may be chance
    cosine    of the angle between the mean gradients of L_IM and L_Diff, which are estimates: it may lie beyond
              ±1. Null where one of them is 0
    alike     mean cosine between the gradients of the two losses on the same batch
    balance   the weight λ_IM with which L_IM's gradient is as long as that of L_Diff on the same batch

Needs torch, numpy, pyarrow, pydantic, pyyaml, pillow and safetensors (matplotlib for a figure), and no Ray.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ims3_ray.cli import main
from ims3_ray.config import DataConfig, FinetuneConfig, Section
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.diffusion.inversion import invert
from ims3_ray.engine.inputs import decoded_split
from ims3_ray.errors import UserError
from ims3_ray.models.generator import generator_path, open_generator
from ims3_ray.objectives.base import Objective, TrainingStep
from ims3_ray.objectives.diffusion import Diffusion
from ims3_ray.objectives.inversion_matching import InversionMatching
from ims3_ray.seeds import generator_for
from ims3_ray.training.finetuning import choose_trained

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class BenchmarkConfig(Section):
    generator: str = "embedded:fashion-mnist-dit"
    """Weights of a generator of pixels."""
    data: DataConfig = DataConfig()
    parameters: Literal["difffit", "all"] = "difffit"
    n_steps: tuple[int, ...] = (1, 2, 5)
    """Numbers N of inversion steps. The gradient flows through the last one and, in a row of its own, through all."""
    bands: int = Field(default=8, ge=1)
    """Number of equal parts of the range of timesteps."""
    batches: int = Field(default=12, ge=2)
    """Number of batches in each band."""
    batch_size: int = Field(default=16, ge=1)
    figure: str | None = None
    """File for a figure of the lengths of the gradients, in the format that its name ends in."""


def benchmark(config: BenchmarkConfig) -> None:
    generator = open_generator(generator_path(config.generator))
    (pixels, labels, names), _ = decoded_split(config.data, "train")
    if generator.latent != tuple(pixels.shape[1:]):
        raise UserError(f"the generator makes {generator.latent}, and images are {tuple(pixels.shape[1:])}; set data.size")
    model = generator.load().to(DEVICE)
    trained = set(choose_trained(generator, model, FinetuneConfig(parameters=config.parameters)))
    parameters = [parameter for name, parameter in model.named_parameters() if name in trained]
    of_class = torch.tensor(generator.labels(names))
    images = CleanImages({"pixels": pixels}, of_class[labels], flip=False)
    grads = sorted({(n, through) for n in config.n_steps for through in (1, n)})
    objectives: dict[tuple[int, int], Objective] = {
        each: InversionMatching(InversionMatching.Config(weight=1, n_steps=each[0], grad_steps=each[1])) for each in grads
    }
    rows = []
    for band in range(config.bands):
        low, high = (generator.schedule.num_steps * edge // config.bands for edge in (band, band + 1))
        found: dict[Any, list[tuple[float, Tensor]]] = {}
        cosines: dict[Any, list[float]] = {}
        for batch in range(config.batches):
            rng = generator_for(0, "gradients", band, batch)
            index = torch.randint(len(labels), (config.batch_size,), generator=rng)
            z0, y = images.batch(index, rng).to(DEVICE), torch.cat([generator.condition(int(c)) for c in images.labels[index]])
            t = torch.randint(low, high, (config.batch_size,), generator=rng).to(DEVICE)
            noise, y = torch.randn(z0.shape, generator=rng).to(DEVICE), y.to(DEVICE)
            for key, objective in {"diffusion": Diffusion(Diffusion.Config()), **objectives}.items():
                step = TrainingStep(
                    model, generator.schedule, z0, y, y, t, noise, output_is_needed=False,
                    parametrisation=generator.parametrisation,
                )  # fmt: skip
                (loss,) = objective(step).values()
                if key != "diffusion":
                    with torch.no_grad():
                        inverted = invert(step.predict, z0, t, generator.schedule, key[0], 0)
                    cosines.setdefault(key, []).append(cosine(inverted, z0))
                else:
                    cosines.setdefault(key, []).append(cosine(step.z_t, z0))
                gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
                found.setdefault(key, []).append((loss.item(), torch.cat([g.flatten() for g in gradient]).double().cpu()))
        print(f"timesteps {low} to {high - 1}", file=sys.stderr, flush=True)
        diffusion = found.pop("diffusion")
        means = {key: float(f"{sum(values) / len(values):.3g}") for key, values in cosines.items()}
        rows.append({
            "timesteps": [low, high - 1], "diffusion": measured(diffusion), "floor": round(1 - means["diffusion"], 4)
        })  # fmt: skip
        rows += [
            {
                "timesteps": [low, high - 1], "n_steps": key[0], "grad_steps": key[1], "parallel": means[key],
                **measured(each, diffusion),
            }
            for key, each in found.items()
        ]  # fmt: skip
    machine = {"device": DEVICE, "cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    settings = config.model_dump(mode="json", exclude={"data", "figure"}) | {"trained": sum(p.numel() for p in parameters)}
    print(json.dumps({"machine": machine, "data": config.data.path, **settings, "rows": rows}, indent=1))
    if config.figure:
        draw_figure(rows, config.figure)


def measured(found: list[tuple[float, Tensor]], beside: list[tuple[float, Tensor]] | None = None) -> dict[str, float | None]:
    """The measures of some batches' losses and gradients; those that compare are with the gradients ``beside``."""
    gradients = torch.stack([gradient for _, gradient in found])
    length, mean = gradients.square().sum(dim=1).mean().sqrt().item(), math.sqrt(max(between(gradients, gradients), 0))
    values: dict[str, float | None] = {
        "loss": sum(loss for loss, _ in found) / len(found), "length": length, "mean": mean,
    }  # fmt: skip
    if beside is not None:
        others = torch.stack([gradient for _, gradient in beside])
        other_mean = math.sqrt(max(between(others, others), 0))
        values["cosine"] = between(gradients, others) / (mean * other_mean) if mean and other_mean else None
        values["alike"] = torch.nn.functional.cosine_similarity(gradients, others).mean().item()
        values["balance"] = others.square().sum(dim=1).mean().sqrt().item() / length
    return {name: None if value is None else float(f"{value:.3g}") for name, value in values.items()}


def draw_figure(rows: list[dict[str, Any]], path: str) -> None:
    """Left: how long the gradients are. Right: how close L_IM is to its floor."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "ims3"  # the same bytes each time
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    lines: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    for row in rows:
        name = "L_Diff" if "diffusion" in row else f"L_IM, N = {row['n_steps']}, {row['grad_steps']} with gradient"
        lines.setdefault(name, []).append((sum(row["timesteps"]) / 2, row))
    styles = itertools.cycle(("s--", "o-", "^-", "v:", "D:", "x-"))
    for (name, found), style in zip(lines.items(), styles, strict=False):
        middle = [t for t, _ in found]
        left.plot(middle, [row.get("diffusion", row)["length"] for _, row in found], style, label=name, markersize=4)
        if name == "L_Diff":
            right.plot(middle, [row["floor"] for _, row in found], "k--", label="floor, 1 − κ")
        elif name.endswith(" 1 with gradient"):  # the loss does not depend on the steps with gradient
            right.plot(middle, [row["loss"] for _, row in found], style, label=name.split(", ")[1], markersize=4)
    left.set(yscale="log", xlabel="timestep t", ylabel="norm of a batch's gradient", title="Gradients")
    right.set(xlabel="timestep t", ylabel="L_IM", title="The loss and the lowest value it can have")
    left.set_ylim(bottom=left.get_ylim()[0] / 30)  # room for the legend below the curves
    left.legend(fontsize=7, loc="lower left", ncols=2)
    right.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None} if Path(path).suffix == ".svg" else None, dpi=110)


def cosine(one: Tensor, other: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten(1), other.flatten(1)).mean().item()


def between(one: Tensor, other: Tensor) -> float:
    """The product of two mean gradients, estimated from pairs of different batches, whose noise is independent."""
    count = len(one)
    whole = one.sum(dim=0) @ other.sum(dim=0) - (one * other).sum()
    return (whole / (count * (count - 1))).item()


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
