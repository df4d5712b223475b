"""Images/s of making candidates, as JSON: the effects of batch, precision, compilation and sampler, compared with the way in
which the published scripts sample.

    python benchmarks/pool.py                                  DiT-S/8 on CPUs; DiT-XL/2 on a GPU if there is one
    python benchmarks/pool.py 'cases=[baseline, unit]'         some of the cases
    python benchmarks/pool.py actors=2 'cases=[pool]'          the same units through Ray, by this number of actors

Weights are random and guidance is on: speed does not depend on the images. A unit is the work that an actor of the pool does at
a time: drawing samples, decoding them with Stable Diffusion's autoencoder, computing features with ResNet-18 (φ) and encoding
PNG, the last on threads while the device works on. `share` is the rate of the generator's, the autoencoder's and φ's own
operations, divided by the rate at which the same device multiplies large matrices of the same type. `cold_s` is the time of the
first unit in seconds, compilation included. `speedup` is relative to `baseline`: batches of ten guided images in float32 (TF32
on a GPU), as IMS3's own script samples; those of DiT and Minimax sample one image at a time (`one image at a time, fp32`).
`generator alone` leaves out what follows sampling. `launches alone` uses a DiT of the same depth but width 64: it shows the
time for launching the kernels, which does not depend on the width. Each case has a process. The processes take turns
with a unit each, and the fastest of each counts, since other load on the machine can only make them slower; the matmul rate is
measured before every unit, and its best counts too.

Needs torch, diffusers, timm, pydantic, pyarrow, pyyaml, pillow and safetensors; Ray for `pool` alone.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from ims3_ray.cli import main
from ims3_ray.cluster.hardware import hardware
from ims3_ray.cluster.speed import measured_rate
from ims3_ray.config import SamplingConfig, Section, canonical
from ims3_ray.errors import UserError
from ims3_ray.models.autoencoder import decoding_flops
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.dit import PUBLISHED, DiT, DiTConfig
from ims3_ray.models.encoder import Encoder, EncoderConfig, embedding_cost
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.stages.candidates import sampling_flops

GPU = torch.cuda.is_available()


class BenchmarkConfig(Section):
    model: Literal["S", "B", "L", "XL"] = "XL" if GPU else "S"
    patch: Literal[2, 4, 8] = 2 if GPU else 8
    image_size: int = Field(default=256, multiple_of=64)
    steps: int = Field(default=50 if GPU else 10, ge=1)
    """Number of sampling steps; the cost is nearly proportional to it."""
    batch: int = Field(default=64 if GPU else 8, ge=1)
    """Number of images in a unit."""
    units: int = Field(default=4, ge=1)
    """Timed units of a case, after one unit that is not timed; fewer if `seconds` have passed."""
    seconds: float = Field(default=60, gt=0)
    """Time for each case, in seconds, after which no further units are started."""
    actors: int = Field(default=1, ge=1)
    """Number of actors of the case `pool`, each with a GPU or one CPU thread."""
    cases: tuple[str, ...] = ()
    """Names of the cases to run; all cases but `pool` when empty."""


@dataclass(frozen=True)
class Case:
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from DDPM, bf16, guidance on 3 of 4 channels and the config's batch and steps."""
    whole: bool = True
    """Whether samples are decoded, passed through φ and encoded as PNG; otherwise they are only drawn."""
    width: int | None = None
    """Width of the DiT, if it differs from the config's."""
    ray: bool = False
    """Whether the units are made by an actor pool on Ray."""


def cases(config: BenchmarkConfig) -> dict[str, Case]:
    return {
        "baseline": Case({"precision": "fp32", "unit_size": 10}),
        "one image at a time, fp32": Case({"precision": "fp32", "unit_size": 1}),
        "one image at a time": Case({"unit_size": 1}),
        "unit": Case(),
        "unit, compiled": Case({"compile": True}),
        "unit, fp32": Case({"precision": "fp32"}),
        "unit, half the batch": Case({"unit_size": max(1, config.batch // 2)}),
        "unit, DPM-Solver++ in 20 steps": Case({"sampler": "dpm++2m", "steps": 20}),
        "unit, guidance on half of the steps": Case({"cfg_interval": (0.25, 0.75)}),
        "unit, without guidance": Case({"cfg_scale": 1.0}),
        "generator alone, baseline": Case({"precision": "fp32", "unit_size": 10}, whole=False),
        "generator alone, one image at a time, fp32": Case({"precision": "fp32", "unit_size": 1}, whole=False),
        "generator alone": Case(whole=False),
        "generator alone, compiled": Case({"compile": True}, whole=False),
        "launches alone": Case({"unit_size": 1}, whole=False, width=64),
        "pool": Case(ray=True),
    }


def sampling_of(config: BenchmarkConfig, case: Case) -> SamplingConfig:
    return SamplingConfig.model_validate(
        {
            "sampler": "ddpm", "steps": config.steps, "cfg_scale": 4.0, "cfg_channels": 3, "clip": False, "precision": "bf16",
            "unit_size": config.batch, **case.settings,
        }
    )  # fmt: skip


def shape_of(config: BenchmarkConfig, case: Case) -> DiTConfig:
    changes = {"patch_size": config.patch, "input_size": config.image_size // 8}
    changes |= {"hidden_size": case.width, "num_heads": 4} if case.width else {}
    return PUBLISHED[config.model].model_copy(update=changes)


def write_models(config: BenchmarkConfig, case: Case, folder: Path) -> None:
    """Write random weights in the formats that a run reads: ``dit.safetensors``, ``vae/``, ``phi.safetensors``."""
    from diffusers import AutoencoderKL

    shape = shape_of(config, case)
    (folder / "dit.safetensors").write_bytes(pack(DiT(shape), canonical(shape), "dit"))
    if not case.whole:
        return
    AutoencoderKL(
        latent_channels=4, block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=config.image_size,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    phi = EncoderConfig(model="resnet18", channels=3, num_classes=1000, mean=0.0, std=0.5, size=224)
    (folder / "phi.safetensors").write_bytes(pack(Encoder(phi), canonical(phi), "encoder"))


def flops_of(config: BenchmarkConfig, case: Case, folder: Path) -> float:
    from ims3_ray.models.autoencoder import autoencoder_path, empty_autoencoder
    from ims3_ray.models.encoder import encoder_config

    flops = sampling_flops(DiTGenerator.of_shape(shape_of(config, case)), sampling_of(config, case))
    if case.whole:
        vae = empty_autoencoder(autoencoder_path(str(folder / "vae")))
        flops += decoding_flops(vae, config.image_size // 8)
        shape = encoder_config(folder / "phi.safetensors").model_dump_json()
        flops += embedding_cost(shape, config.image_size)[0]
    return flops


def turns(config: BenchmarkConfig, name: str) -> Iterator[dict[str, Any]]:
    """Make units with the code of one actor, without Ray; images are encoded while the device works on the next unit. Gives
    first the time of a unit that includes reading the weights, and then, for each further unit, its `seconds` and the matmul
    `rate` before it."""
    from ims3_ray.data.transforms import to_pil
    from ims3_ray.io.parquet import encode_png
    from ims3_ray.models.autoencoder import autoencoder_path
    from ims3_ray.models.encoder import load_encoder
    from ims3_ray.stages.adapters import Pretrained
    from ims3_ray.stages.candidates import Candidates
    from ims3_ray.stages.features import Features

    case, device = cases(config)[name], "cuda" if GPU else "cpu"
    sampling = sampling_of(config, case)
    behind, waiting = ThreadPoolExecutor(2), list[Future[int]]()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(config, case, folder)
        flops = flops_of(config, case, folder)
        vae = autoencoder_path(str(folder / "vae")) if case.whole else None
        produce = Candidates(sampling, Pretrained.of_file(folder / "dit.safetensors"), None, vae, 0, device)
        features = Features(load_encoder(folder / "phi.safetensors"), device) if case.whole else None

        def one_unit(number: int) -> None:
            produced, before = produce(f"c0000-u{number:05d}"), list(waiting)
            waiting.clear()
            if features is not None:
                features("c0000-u00000", produced)
                pixels = produced.pixels.cpu()
                waiting.extend(behind.submit(lambda image: len(encode_png(to_pil(image))), image) for image in pixels)
            if GPU:
                torch.cuda.synchronize()
            for encoding in before:  # those of the unit before
                encoding.result()

        began = time.perf_counter()
        one_unit(0)  # includes reading the weights, and compilation where the case has it
        cold = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if GPU else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    row = {"case": name, "cold_s": round(cold, 2), "peak_gb": round(peak / 1e9, 2)}
    if produce.batch < sampling.unit_size:
        row["batch"] = produce.batch  # the largest batch that fitted into memory
    yield {"row": row, "images": sampling.unit_size, "flops": flops}
    for number in itertools.count(1):
        if GPU:
            torch.cuda.empty_cache()  # the other processes need the memory meanwhile
        rate = measured_rate(*device_of(sampling))
        began = time.perf_counter()
        one_unit(number)
        yield {"seconds": time.perf_counter() - began, "rate": rate}


def measure_pool(config: BenchmarkConfig, name: str) -> dict[str, Any]:
    """Make the same units on a Ray Data actor pool. The time for its start is not counted; that for writing shards is."""
    from ims3_ray.cluster.joining import connected
    from ims3_ray.config import ActorsConfig, ClusterConfig
    from ims3_ray.engine.actors import run_units
    from ims3_ray.engine.images import ImageStore
    from ims3_ray.engine.weights import Weights
    from ims3_ray.engine.worker import Derivation, Work
    from ims3_ray.io.artifacts import Artifact
    from ims3_ray.io.storage import Storage
    from ims3_ray.models.autoencoder import autoencoder_path
    from ims3_ray.models.encoder import encoder_path
    from ims3_ray.models.generator import generator_path
    from ims3_ray.stages.adapters import Pretrained
    from ims3_ray.stages.candidates import candidates_of
    from ims3_ray.stages.embed import Embed

    case = cases(config)[name]
    sampling = sampling_of(config, case)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_models(config, case, folder)
        weights = {
            "generator": Weights.of(generator_path, str(folder / "dit.safetensors")),
            "autoencoder": Weights.of(autoencoder_path, str(folder / "vae")),
            "encoder": Weights.of(encoder_path, str(folder / "phi.safetensors")),
        }
        storage = Storage.at(str(folder / "storage"))
        images, embedded = Artifact(storage, "generate", "benchmark"), Artifact(storage, "embed", "benchmark")
        features = Derivation(Embed("embed", {}, weights=weights).derive(storage), embedded)
        produce = candidates_of(sampling, Pretrained(weights["generator"]), weights["autoencoder"], None, 0)
        work = Work(produce, ImageStore(images, "png"), (features,), images)
        actors = ActorsConfig(count=config.actors, gpus=1 if GPU else 0)
        needed = {"GPU": float(config.actors)} if GPU else {"CPU": float(config.actors)}
        with connected(ClusterConfig(), needed):
            names = [f"c0000-u{number:05d}" for number in range((config.units + 1) * config.actors)]
            ends = []
            for _, unit, entry in run_units([(0, name) for name in names], [work], actors, ClusterConfig()):
                if "error" in entry:
                    raise UserError(f"unit {unit} failed: {entry['error']}")
                ends.append(time.perf_counter())
        flops = flops_of(config, case, folder)
    steady = ends[config.actors - 1 :]  # without the first units, in which each actor warms up
    seconds = (steady[-1] - steady[0]) / (len(steady) - 1)
    row = {"case": name, "actors": config.actors}
    possible = measured_rate(*device_of(sampling)) * (config.actors if GPU else 1)
    return row | rates(seconds, sampling.unit_size, flops, possible)


def device_of(sampling: SamplingConfig) -> tuple[str, torch.dtype]:
    return "cuda" if GPU else "cpu", torch.bfloat16 if sampling.precision == "bf16" else torch.float32


def rates(seconds: float, images: int, flops: float, possible: float) -> dict[str, Any]:
    achieved = images / seconds * flops
    return {
        "images_per_s": round(images / seconds, 3), "s_per_unit": round(seconds, 3), "tflop_per_image": round(flops / 1e12, 3),
        "tflop_per_s": round(achieved / 1e12, 3), "matmul_tflop_per_s": round(possible / 1e12, 3),
        "share": round(achieved / possible, 3),
    }  # fmt: skip


def take_turns(config: BenchmarkConfig, name: str, ours: Connection) -> None:
    """The process of a case: answers every message with its next turn."""
    sys.stdout = sys.stderr
    torch.backends.cuda.matmul.allow_tf32 = "baseline" in name  # as in the published scripts
    try:
        if cases(config)[name].ray:
            ours.send({"row": measure_pool(config, name)})
            return
        for turn in turns(config, name):
            ours.send(turn)
            ours.recv()
    except EOFError:  # the other side has closed: all turns are taken
        pass
    except (torch.OutOfMemoryError, UserError) as error:
        ours.send({"row": {"case": name, "error": str(error).splitlines()[0]}})


class Competitor:
    """A case whose process takes turns with those of the others."""

    def __init__(self, config: BenchmarkConfig, name: str) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.name = name
        self._theirs, ours = spawn.Pipe()
        self._process = spawn.Process(target=take_turns, args=(config, name, ours))
        self._process.start()
        ours.close()
        self.seconds, self.rate = float("inf"), 0.0
        first = self._answer()
        self.row: dict[str, Any] = first["row"]
        self.images, self.flops = first.get("images", 0), first.get("flops", 0.0)

    def turn(self) -> None:
        """Make a unit; nothing happens for a case that has failed or has no turns."""
        if not self.images:
            return
        self._theirs.send("next")
        turn = self._answer()
        if "row" in turn:
            self.row, self.images = turn["row"], 0
        else:
            self.seconds, self.rate = min(self.seconds, turn["seconds"]), max(self.rate, turn["rate"])

    def result(self) -> dict[str, Any]:
        """The row of the case, from its fastest unit."""
        self._theirs.close()
        self._process.join()
        return self.row | (rates(self.seconds, self.images, self.flops, self.rate) if self.images else {})

    def _answer(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = self._theirs.recv()
        except EOFError:
            self._process.join()
            found = {"row": {"case": self.name, "error": f"exit code {self._process.exitcode}"}}
        return found


def benchmark(config: BenchmarkConfig) -> None:
    known = cases(config)
    if unknown := set(config.cases) - known.keys():
        raise UserError(f"there is no case '{min(unknown)}'; choose from: {'; '.join(known)}")
    names = config.cases or [name for name, case in known.items() if not case.ray]
    there = [Competitor(config, name) for name in names]
    began = time.perf_counter()
    for _ in range(config.units):
        if time.perf_counter() - began > config.seconds * len(there):
            break
        for competitor in there:
            competitor.turn()
    rows = [competitor.result() for competitor in there]
    for row in rows:
        published = "baseline" if known[row["case"]].whole else "generator alone, baseline"
        base = next((other for other in rows if other["case"] == published), {})
        if "images_per_s" in row.keys() & base.keys():
            row["speedup"] = round(row["images_per_s"] / base["images_per_s"], 2)
        print(json.dumps(row), file=sys.stderr, flush=True)
    machine: dict[str, Any] = hardware("cuda" if GPU else "cpu") | ({} if GPU else {"threads": torch.get_num_threads()})
    print(json.dumps({"machine": machine, "model": f"DiT-{config.model}/{config.patch}", "cases": rows}, indent=1))


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
