"""The command of `jobs/pretrain.py`: trains the generator or φ, evaluates it, and writes a weights file with its card."""

from __future__ import annotations

import platform
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
import yaml

from ims3_ray.cluster.capacity import wait_for_capacity
from ims3_ray.cluster.joining import connected, own_device, placed
from ims3_ray.commands.quality import Quality, judge_encoder, judge_generator, splits_of
from ims3_ray.config import PretrainConfig, canonical
from ims3_ray.data.contact_sheet import contact_sheet
from ims3_ray.data.sources import open_source
from ims3_ray.errors import UserError
from ims3_ray.io.files import is_remote


def pretrain(config: PretrainConfig) -> Path:
    """Train ``config.target`` and write the weights and their card to ``{storage}/{name}/``. Returns the safetensors file."""
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
        from ims3_ray.engine.loops import encoder_loop, generator_loop, source_images
        from ims3_ray.engine.train import fit

        labels = config.cluster.place.get("finetune")
        workers = [trainer.worker_resources] * trainer.num_workers
        wait_for_capacity(config.cluster, "finetune", config.name, workers, trainer.num_workers)
        if config.target == "generator":
            outcome = fit(generator_loop, canonical(config), trainer, "train", str(folder), labels)
        else:
            arguments = {
                "training": canonical(config.encoder), "images": partial(source_images, config.data), "seed": config.seed,
                "threads": trainer.threads_per_worker,
            }  # fmt: skip
            outcome = fit(encoder_loop, arguments, trainer, "train", str(folder), labels)
        path.write_bytes(outcome["weights"])
        threads = config.quality.threads
        task = ray.remote(_judge).options(
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


def _judge(config: PretrainConfig, path: Path) -> Quality:
    judge = judge_generator if config.target == "generator" else judge_encoder
    return judge(config, path, splits_of(config.data), own_device())


def weights_card(config: PretrainConfig, outcome: dict[str, Any], path: Path, quality: Quality) -> str:
    """The Markdown card of the weights: data, steps, seconds, hardware, quality, and the config that reproduces them."""
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
