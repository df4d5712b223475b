"""What the training of a generator or an encoder will take, as text for ``--dry-run``."""

from __future__ import annotations

from dataclasses import dataclass

from ims3_ray.config import PretrainConfig, reserved
from ims3_ray.config.evaluation import for_ipc
from ims3_ray.engine.inputs import Data
from ims3_ray.engine.stage import Worker
from ims3_ray.io.storage import Storage
from ims3_ray.models.encoder import embedding_cost
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.models.student_costs import forward_flops
from ims3_ray.plan.estimate import hours_text, money_text, scaled
from ims3_ray.stages.candidates import sampling_flops
from ims3_ray.stages.teacher import shape_in_training
from ims3_ray.training.generator import dit_config


@dataclass(frozen=True)
class PretrainingPlan:
    """A training whose input was found to be good, and its cost."""

    config: PretrainConfig
    classes: int
    images: int
    """Number of training images."""

    @classmethod
    def of(cls, config: PretrainConfig, data: Data) -> PretrainingPlan:
        return cls(config, len(data.classes.names), sum(data.classes.counts))

    @property
    def total(self) -> tuple[float, str]:
        """Length of the training, and its unit."""
        config = self.config
        if config.target == "encoder":
            return float(config.encoder.epochs * -(-self.images // config.encoder.batch_size)), "steps"
        g = config.generator
        return (float(g.steps), "steps") if g.steps is not None else (g.minutes or 0.0, "minutes")

    @property
    def described(self) -> str:
        """What is trained, how long, what judges it and what all of it will take."""
        config, cluster = self.config, self.config.cluster
        trainer, data = config.trainer, config.data
        cores = 0.0 if trainer.gpus_per_worker else float(trainer.threads_per_worker)
        worker = Worker("finetune", cores, trainer.gpus_per_worker, trainer.num_workers)
        length, flops = self._length(worker.flop_rate(cluster) * trainer.num_workers)
        work = flops + self.judging_flops
        hours = work / worker.flop_rate(cluster) / 3600
        device_hours = {worker.unit: hours * worker.devices}
        money = hours * cluster.hourly("finetune", trainer.cpus_per_worker, trainer.gpus_per_worker)
        needed = reserved(trainer.cpus_per_worker * trainer.num_workers, trainer.gpus_per_worker * trainer.num_workers)
        return "\n".join(
            [
                f"train the {config.target}: {self.images} images of {self.classes} classes, "
                f"{data.channels} × {data.size} × {data.size}",
                f"network: {self._network}",
                f"length: {length}",
                f"judge: {self.judging}",
                f"to compute: {scaled(work)}FLOP, {hours_text(device_hours, cluster)}, without start-up",
                money_text(money, cluster),
                f"needs at a time: {', '.join(f'{v:g} {k}' for k, v in needed.items())}",
                f"weights: {Storage.at(config.storage).address(config.name)}/{config.name}.safetensors",
            ]
        )

    @property
    def _network(self) -> str:
        config, data = self.config, self.config.data
        if config.target == "encoder":
            return f"{config.encoder.model} of timm, {scaled(self._encoder_flops)}FLOP per image forwards"
        shape = dit_config(config.generator, data.size, data.channels, self.classes)
        return (
            f"DiT of {shape.depth} blocks of width {shape.hidden_size}, patches of {shape.patch_size} pixels, "
            f"{scaled(shape.forward_flops())}FLOP per image forwards"
        )

    @property
    def _encoder_flops(self) -> float:
        shape = shape_in_training(self.config.encoder, self.config.data.channels, self.classes)
        return embedding_cost(shape.model_dump_json(), self.config.data.size)[0]

    def _length(self, rate: float) -> tuple[str, float]:
        """How long the training is, as text and in floating-point operations, at ``rate`` FLOP/s of all workers."""
        config, data = self.config, self.config.data
        if config.target == "encoder":
            return f"{config.encoder.epochs} epochs", 3 * self._encoder_flops * config.encoder.epochs * self.images
        g = config.generator
        step = 3 * dit_config(g, data.size, data.channels, self.classes).forward_flops() * g.batch_size
        if g.minutes is None:
            steps, text = float(g.steps or 0), f"{g.steps} steps"
        else:
            steps = 60 * g.minutes * rate / step
            text = f"{g.minutes:g} minutes, which are about {steps:.0f} steps"
        return f"{text} of {g.batch_size} images, {steps * g.batch_size / self.images:.3g} passes over the images", steps * step

    @property
    def judging_flops(self) -> float:
        """Floating-point operations of the judge's training and of the samples that it looks at."""
        config, data, q = self.config, self.config.data, self.config.quality
        if config.target == "encoder" or q.judge is None:
            return 0.0
        student = q.judge.students[0]
        forward = forward_flops(student, data.channels, data.size, self.classes, q.judge.norm, q.judge.width)
        epochs = for_ipc(q.judge.epochs, -(-self.images // self.classes))
        shape = dit_config(config.generator, data.size, data.channels, self.classes)
        samples = q.images_per_class * self.classes
        return 3 * forward * epochs * self.images + samples * (
            forward + sampling_flops(DiTGenerator.of_shape(shape), q.sampling)
        )

    @property
    def judging(self) -> str:
        """What judges the weights."""
        q = self.config.quality
        if self.config.target == "encoder":
            return "its own classification head on the test split"
        if q.judge is None:
            return "none (quality.judge=null)"
        return (
            f"{q.judge.students[0]} of width {q.judge.width}, trained on all training images, looks at {q.images_per_class} "
            f"samples a class; {scaled(self.judging_flops)}FLOP"
        )
