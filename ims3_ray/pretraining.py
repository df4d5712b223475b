"""Drives `jobs/pretrain.py`: trains the generator or φ and writes a weights file with its card."""

from __future__ import annotations

from pathlib import Path

from ims3_ray.cluster import connected
from ims3_ray.config import PretrainConfig, canonical
from ims3_ray.data.sources import open_source


def pretrain(config: PretrainConfig) -> Path:
    """Train ``config.target`` and return the path of the safetensors file in ``{storage}/{name}/``."""
    open_source(config.data.path, config.data.train_split)  # a bad source is an error before Ray starts
    folder = Path(config.storage).expanduser().resolve() / config.name
    folder.mkdir(parents=True, exist_ok=True)
    trainer = config.trainer
    needed = {"CPU": trainer.num_workers * trainer.cpus_per_worker, "GPU": trainer.num_workers * trainer.gpus_per_worker}
    with connected(config.cluster, {k: v for k, v in needed.items() if v}):
        from ims3_ray.stages.pretrain import generator_loop
        from ims3_ray.stages.train import fit

        outcome = fit(generator_loop, canonical(config), trainer, "train", str(folder))
    path = folder / f"{config.name}.safetensors"
    path.write_bytes(outcome["weights"])
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB after {outcome['seconds']:.0f} s")
    return path
