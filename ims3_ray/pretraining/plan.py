"""What the training of weights will take, as text for ``--dry-run``."""

from __future__ import annotations

from ims3_ray.config import reserved
from ims3_ray.engine.stage import Worker
from ims3_ray.io.storage import Storage
from ims3_ray.plan.estimate import hours_text, money_text, scaled
from ims3_ray.pretraining.base import Target


def described(target: Target) -> str:
    """What is trained, how long, what judges it and what all of it will take."""
    config, cluster, data = target.config, target.config.cluster, target.config.data
    trainer = config.trainer
    cores = 0.0 if trainer.gpus_per_worker else float(trainer.threads_per_worker)
    worker = Worker("finetune", cores, trainer.gpus_per_worker, trainer.num_workers)
    length, flops = target.length(worker.flop_rate(cluster) * trainer.num_workers)
    work = flops + target.judging_flops
    hours = work / worker.flop_rate(cluster) / 3600
    device_hours = {worker.unit: hours * worker.devices}
    money = hours * cluster.hourly("finetune", trainer.cpus_per_worker, trainer.gpus_per_worker)
    needed = reserved(trainer.cpus_per_worker * trainer.num_workers, trainer.gpus_per_worker * trainer.num_workers)
    return "\n".join(
        [
            f"train the {config.target}: {target.images} images of {target.classes} classes, "
            f"{data.channels} × {data.size} × {data.size}",
            f"network: {target.network}",
            f"length: {length}",
            f"judge: {target.judging}",
            f"to compute: {scaled(work)}FLOP, {hours_text(device_hours, cluster)}, without start-up",
            money_text(money, cluster),
            f"needs at a time: {', '.join(f'{v:g} {k}' for k, v in needed.items())}",
            f"weights: {Storage.at(config.storage).address(config.name)}/{config.name}.safetensors",
        ]
    )
