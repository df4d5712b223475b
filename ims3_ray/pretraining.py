"""Drives `jobs/pretrain.py`: trains the generator or φ, judges it, and writes a weights file with its card."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import yaml
from torch import Tensor

from ims3_ray.cluster import connected, own_device, placed
from ims3_ray.config import PretrainConfig, canonical
from ims3_ray.data.batches import load_pixels
from ims3_ray.data.files import is_remote
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_signed
from ims3_ray.errors import UserError
from ims3_ray.evaluation import accuracy_of, train_student
from ims3_ray.models.encoder import load_encoder
from ims3_ray.room import wait_for_room
from ims3_ray.stages.base import units_of
from ims3_ray.stages.export import contact_sheet


@dataclass(frozen=True)
class Quality:
    """Figures for the card, and (of a generator) samples to look at, uint8 [classes·per_class, C, H, W]."""

    lines: list[str]
    samples: Tensor | None = None


def pretrain(config: PretrainConfig) -> Path:
    """Train ``config.target``; returns the safetensors file in ``{storage}/{name}/``, beside which its card lies."""
    if is_remote(config.storage):
        raise UserError(f"storage '{config.storage}' is remote; weights are trained to a folder, so give storage=/a/folder")
    open_source(config.data.path, config.data.train_split)  # a bad source is an error before Ray starts
    open_source(config.data.test_path or config.data.path, config.data.test_split)
    folder = Path(config.storage).expanduser().resolve() / config.name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{config.name}.safetensors"
    trainer = config.trainer
    needed = {"CPU": trainer.num_workers * trainer.cpus_per_worker, "GPU": trainer.num_workers * trainer.gpus_per_worker}
    with connected(config.cluster, {k: v for k, v in needed.items() if v}):
        from ims3_ray.stages.pretrain_encoder import encoder_loop, source_images
        from ims3_ray.stages.pretrain_generator import generator_loop
        from ims3_ray.stages.train import fit

        labels = config.cluster.place.get("finetune")
        workers = [trainer.worker_resources] * trainer.num_workers
        wait_for_room(config.cluster, "finetune", config.name, workers, trainer.num_workers)
        if config.target == "generator":
            outcome = fit(generator_loop, canonical(config), trainer, "train", str(folder), labels)
        else:
            arguments = {
                "training": canonical(config.encoder), "images": partial(source_images, config.data), "seed": config.seed,
                "threads": trainer.threads_per_worker,
            }  # fmt: skip
            outcome = fit(encoder_loop, arguments, trainer, "train", str(folder), labels)
        path.write_bytes(outcome["weights"])
        judge = judge_generator if config.target == "generator" else judge_encoder
        threads = config.quality.threads
        task = ray.remote(judge).options(
            num_cpus=min(threads, trainer.cpus_per_worker),
            num_gpus=trainer.gpus_per_worker,
            **placed(config.cluster, "finetune"),
        )
        quality: Quality = ray.get(task.remote(config, path))
    if quality.samples is not None:
        (folder / f"{config.name}.png").write_bytes(contact_sheet(quality.samples, 10))
    card = folder / f"{config.name}.md"
    card.write_text(weights_card(config, outcome, path, quality))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB after {outcome['seconds']:.0f} s")
    print("\n".join(quality.lines))
    return path


def judge_generator(config: PretrainConfig, weights: Path) -> Quality:
    """How often a classifier trained on the real training split names guided samples as they were asked for."""
    from ims3_ray.stages.producers import Candidates

    q = config.quality
    torch.set_num_threads(q.threads)
    device = own_device()
    train, test, names = _splits(config)
    student, accuracy = train_student(q.judge.students[0], train, test, len(names), q.judge, 0, device=device)
    produce = Candidates(q.sampling, weights, None, None, config.seed, device)
    agreed, first = [], []
    for label in range(len(names)):
        units = units_of(label, q.images_per_class, q.sampling.unit_size)
        samples = torch.cat([produce(unit).pixels.cpu() for unit in units])[: q.images_per_class]
        agreed.append(accuracy_of(student, (samples, torch.full((len(samples),), label)), len(names), device))
        first.append(samples[:10])
    s = q.sampling
    return Quality(
        [
            f"judge: {q.judge.students[0]} of width {q.judge.width}, {q.judge.epochs} epochs on the real training split, "
            f"{accuracy.last:.1f} % on the test split",
            f"the judge names {sum(agreed) / len(agreed):.1f} % of {q.images_per_class} guided samples a class as they were "
            f"asked for ({s.sampler}, {s.steps} steps, guidance {s.cfg_scale:g})",
            "by class: " + ", ".join(f"{name} {share:.0f} %" for name, share in zip(names, agreed, strict=True)),
        ],
        torch.cat(first),
    )


def judge_encoder(config: PretrainConfig, weights: Path) -> Quality:
    """Test accuracy of φ's own classification head."""
    torch.set_num_threads(config.quality.threads)
    _, (pixels, labels), _ = _splits(config)
    encoder = load_encoder(weights)
    with torch.inference_mode():
        predicted = torch.cat([encoder.logits(to_signed(part)).argmax(dim=1) for part in pixels.split(500)])
    share = 100 * (predicted == labels).float().mean().item()
    return Quality([f"its classification head: {share:.1f} % on the test split; features have {encoder.dim} dimensions"])


Labelled = tuple[Tensor, Tensor]


def _splits(config: PretrainConfig) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    data = config.data
    train = open_source(data.path, data.train_split)
    test = open_source(data.test_path or data.path, data.test_split)
    loaded = [load_pixels(source, data.size, data.channels)[:2] for source in (train, test)]
    return loaded[0], loaded[1], train.class_names


def weights_card(config: PretrainConfig, outcome: dict[str, Any], path: Path, quality: Quality) -> str:
    """Markdown beside the weights: data, steps, seconds, hardware, quality, and the config that makes them again."""
    trainer = config.trainer
    device = torch.cuda.get_device_name() if trainer.gpus_per_worker else platform.processor() or platform.machine()
    hardware = f"{trainer.num_workers} worker(s), each with {trainer.threads_per_worker} CPU threads ({device})"
    if trainer.gpus_per_worker:
        hardware = f"{trainer.num_workers} worker(s), each with {trainer.gpus_per_worker:g} GPU ({device})"
    batch = config.generator.batch_size if config.target == "generator" else config.encoder.batch_size
    recent = outcome["losses"][-250:]
    kept = {"name", "seed", "target", "data", config.target, "trainer"} | (
        {"quality"} if quality.samples is not None else set()
    )
    plain = {key: value for key, value in canonical(config).items() if key in kept}
    plain["data"] = {**plain["data"], "path": Path(config.data.path).name}
    return "\n".join(
        [
            f"# {config.name}", "",
            f"The {config.target} trained by `jobs/pretrain.py` on the training split alone.", "",
            f"- data: {Path(config.data.path).name}, split {config.data.train_split}, {outcome['images']} images",
            f"- steps: {outcome['steps']} of {batch} images, mean loss at the end {sum(recent) / len(recent):.4f}",
            f"- seconds: {outcome['seconds']:.0f}", f"- hardware: {hardware}",
            f"- file: {path.stat().st_size / 1e6:.1f} MB, safetensors, half precision", "",
            "## Quality", "", *(f"- {line}" for line in quality.lines), "",
            "The test split was used for these figures alone, after training.", "",
            "## Config", "", "```yaml", yaml.safe_dump(plain, sort_keys=False).strip(), "```", "",
        ]
    )  # fmt: skip
