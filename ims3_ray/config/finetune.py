"""Fine-tuning: what is minimised, how, and on which workers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ims3_ray.component import Components
from ims3_ray.config.base import Fraction, Section, canonical, reserved, with_length
from ims3_ray.objectives.base import Objective


class TrainerConfig(Section):
    """The workers of Ray Train: their number and the resources of each."""

    num_workers: int = Field(default=2, ge=1)
    """Number of training workers."""
    max_workers: int | None = Field(default=None, ge=1)
    """Largest number of workers of elastic training. Ray Train then uses as many workers as the cluster has room for, at least
    num_workers, and changes their number during training. When unset, there are always num_workers."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs reserved for each worker."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs reserved for each worker."""
    threads_per_worker: int = Field(default=1, ge=1)
    """Number of PyTorch threads of each worker."""
    max_failures: int = Field(default=3, ge=0)
    """Number of times that Ray Train restarts the workers from the last checkpoint after a failure."""

    @model_validator(mode="after")
    def _range(self) -> TrainerConfig:
        if self.max_workers is not None and self.max_workers < self.num_workers:
            raise ValueError(f"max_workers={self.max_workers} is below num_workers={self.num_workers}; raise it")
        return self

    @property
    def most_workers(self) -> int:
        return self.max_workers or self.num_workers

    @property
    def worker_resources(self) -> dict[str, float]:
        """What Ray reserves for each worker."""
        return reserved(self.cpus_per_worker, self.gpus_per_worker)


class ObjectivesConfig(Components):
    """The objectives of fine-tuning, which minimises their weighted sum. A weight of 0 leaves a term out and costs nothing."""

    registries = (Objective.registry,)

    @model_validator(mode="after")
    def _something(self) -> ObjectivesConfig:
        if not self.active:
            raise ValueError("every objective has weight 0, so there is nothing to learn; set diffusion.weight=1")
        return self

    @property
    def active(self) -> list[type[Objective]]:
        """The objectives with a weight above 0, sorted by name."""
        return [objective for objective in Objective.registry.values() if objective.is_on(self.of(objective))]

    def made(self) -> list[Objective]:
        """The active objectives, ready to be called. Those that do not need the shared forward pass come first, so that the
        first of their own forward passes computes the shared one in the same batch."""
        return [objective(self.of(objective)) for objective in sorted(self.active, key=lambda each: each.needs_output)]

    @property
    def title(self) -> str:
        """The titles of the active objectives."""
        return " + ".join(objective.title(self.of(objective)) for objective in self.active)

    @property
    def described(self) -> str:
        """The active objectives with their weights, for the report."""
        return " + ".join(objective.described(self.of(objective)) for objective in self.active)

    @property
    def couple_samples(self) -> bool:
        """Whether a term compares images of a batch with each other, so that the way in which a batch is divided matters."""
        return any(objective.couples_samples for objective in self.active)

    @property
    def passes(self) -> tuple[int, int]:
        """Number of forward passes of a step, including the shared one, and how many of them carry a gradient."""
        shared = int(any(objective.needs_output for objective in self.active))
        own = [objective.passes(self.of(objective)) for objective in self.active]
        return shared + sum(forward for forward, _ in own), shared + sum(backward for _, backward in own)


class FinetuneConfig(Section):
    """Fine-tuning of the generator (section 4.1, Algorithm 1)."""

    steps: int | None = Field(default=120, ge=1)
    """Number of steps. It is an alternative to `epochs`."""
    epochs: float | None = Field(default=None, gt=0)
    """Number of passes over the images. It is an alternative to `steps`, which is then null."""
    batch_size: int = Field(default=32, ge=1)
    """Number of images in the global batch, over all workers."""
    accumulate: int = Field(default=1, ge=1)
    """Number of pieces into which each worker divides its part of a batch; their gradients are added. More pieces need less
    memory, and the step stays the same."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of AdamW."""
    table_lr: float = Field(default=1.0, gt=0)
    """Learning rate of the table of labels, as a multiple of `lr`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Weight decay of AdamW."""
    parameters: Literal["difffit", "lora", "all"] = "difffit"
    """Parameters that are trained: biases, norms, the label table and scale vectors (`difffit`, of a DiT), low-rank additions
    to the attention's weights (`lora`, of Stable Diffusion), or everything (`all`)."""
    rank: int = Field(default=16, ge=1)
    """Rank of the additions of `lora`."""
    words: Literal["class", "captions"] = "class"
    """What a generator that takes words is told of each image: the prompt of its class, or its caption (`data.captions`), cut
    after the 77 tokens that CLIP reads at once."""
    scaled_blocks: int = Field(default=14, ge=0)
    """Number of blocks, counted from the first, to which DiffFit adds scale vectors γ."""
    objectives: ObjectivesConfig = ObjectivesConfig()
    flip: bool = False
    """Whether half of the images, chosen at random, are mirrored; right for photographs, wrong for digits."""
    label_dropout: Fraction = 0.1
    """Share of samples whose class is hidden from the model in L_Diff, as classifier-free guidance needs."""
    ema_decay: Fraction = 0.99
    """Decay of the exponential moving average of the trained parameters. The average becomes the adapter."""
    ema_warmup: bool = True
    """Whether the average starts with smaller decays, so that it forgets the pretrained values soon (the code of DiT and of
    Minimax does not do this)."""
    classes_per_group: int | None = Field(default=None, ge=1)
    """Largest number of classes in a group. Groups are fine-tuned independently and in parallel, each with its own adapter.
    When unset, all classes are one group."""
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """Number format. With `bf16`, frozen weights and arithmetic are in bfloat16; the trained parameters, their gradients and
    the optimizer's state stay in float32. `auto` is decided as for sampling, by the workers' GPUs."""
    compile: bool = False
    """Whether each transformer block is compiled with torch.compile. All blocks share one compilation, which pays off after
    some minutes of GPU work."""
    activation_checkpointing: bool = False
    """Whether the backward pass recomputes each block instead of keeping its activations: less memory for a third more work."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """Stage of DeepSpeed ZeRO, which says what is partitioned among the workers: 0 nothing, 1 the optimizer's state, 2
    gradients too, 3 parameters too."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Number of steps between checkpoints; after a failure, training resumes from the last checkpoint."""
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="before")
    @classmethod
    def _the_given_length(cls, values: Any) -> Any:
        """With ``epochs`` alone, ``steps`` is null."""
        return with_length(values, "epochs", "steps")

    @model_validator(mode="after")
    def _possible(self) -> FinetuneConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set one of steps and epochs, and leave the other out")
        workers, pieces = self.trainer.most_workers, self.accumulate
        if self.batch_size < workers * pieces:
            raise ValueError(
                f"batch_size={self.batch_size} is too small for {workers} workers with accumulate={pieces}; change one of them"
            )
        if self.trainer.max_workers is not None and self.zero_stage > 0:
            raise ValueError(
                f"trainer.max_workers needs zero_stage=0, not {self.zero_stage}: "
                "what ZeRO shares out belongs to one number of workers"
            )
        if self.zero_stage == 3 and self.compile:
            raise ValueError("compile=true does not go with zero_stage=3, which swaps parameters inside blocks; leave one out")
        return self

    def total_steps(self, images: int) -> int:
        """Number of steps of a fine-tuning on this number of images."""
        return self.steps if self.steps is not None else math.ceil((self.epochs or 0) * images / self.batch_size)


ADOPTING = ("like", "encoder")
"""Settings of :class:`AdoptConfig` that a fine-tuning does not have."""


class AdoptConfig(FinetuneConfig):
    """Teaching the generator the classes of the data that it does not know, by the objective L_Diff (docs/own-images.md)."""

    like: Literal["nearest", "null"] | dict[str, str] = "nearest"
    """The condition from which each new class starts to learn. `nearest`: that of a known class that φ's own classifier takes
    it for, another one for each new class, so that they begin apart. `null`: that of no class. `{new: known}`: those of known
    classes by name."""
    encoder: str | None = None
    """φ whose own classifier finds the nearest known class; `encoder` of the run when unset. It has to know classes of the
    generator, as `timm/resnet18.tv_in1k` does for a generator of ImageNet."""
    table_lr: float = Field(default=10.0, gt=0)
    """Learning rate of the table of labels, as a multiple of `lr`."""
    steps: int | None = Field(default=1000, ge=1)
    """Number of steps. It is an alternative to `epochs`."""
    batch_size: int = Field(default=64, ge=1)
    """Number of images in the global batch, over all workers."""
    objectives: ObjectivesConfig = ObjectivesConfig.model_validate({"inversion_matching": {"weight": 0.0}})

    @field_validator("objectives", mode="before")
    @classmethod
    def _without_inversion_matching(cls, given: Any) -> Any:
        """Objectives of which inversion matching is none, unless it is named."""
        return {"inversion_matching": {"weight": 0.0}, **given} if isinstance(given, Mapping) else given

    @model_validator(mode="after")
    def _one_group(self) -> AdoptConfig:
        if self.classes_per_group is not None:
            raise ValueError("classes_per_group is for finetune; adopted classes are learnt together: leave it out")
        if [objective.name for objective in self.objectives.active] != ["diffusion"]:
            raise ValueError("objectives: classes are adopted by diffusion alone; other objectives are for finetune")
        return self

    @property
    def tuning(self) -> FinetuneConfig:
        """The settings as those of a fine-tuning."""
        return FinetuneConfig.model_validate({key: value for key, value in canonical(self).items() if key not in ADOPTING})
