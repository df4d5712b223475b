"""What a set of images is worth: protocols by which students are trained on it, and the teacher of soft labels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ims3_ray.config.base import Fraction, Name, Section
from ims3_ray.config.finetune import TrainerConfig
from ims3_ray.models.students import Norm, check_student

Count = Annotated[int, Field(ge=1)]
ByIpc = Count | Annotated[dict[Count, Count], Field(min_length=1)]
"""A number, or a table of it by images per class: that of the first bound that is not exceeded, the last one beyond."""


def for_ipc(value: ByIpc, ipc: int) -> int:
    """What :data:`ByIpc` says for ``ipc`` images per class."""
    if isinstance(value, int):
        return value
    return next((value[bound] for bound in sorted(value) if ipc <= bound), value[max(value)])


class AugmentConfig(Section):
    """What happens to a batch of training images, on their device, in this order."""

    shuffle_patches: int = Field(default=1, ge=1)
    """Cut into so many patches a side, which change places (RDED: 2); 1 is none."""
    crop: tuple[Fraction, Fraction] | None = None
    """RandomResizedCrop: the share of the area that is kept."""
    max_shift: int = Field(default=0, ge=0)
    """Random shift by up to so many pixels."""
    flip: bool = False
    """Random horizontal mirroring."""
    jitter: Fraction = 0.0
    """ColorJitter of brightness, contrast and saturation, in random order."""
    lighting: float = Field(default=0.0, ge=0)
    """AlexNet's colour noise along ImageNet's principal components; its standard deviation."""

    @model_validator(mode="after")
    def _area(self) -> AugmentConfig:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1]:
            raise ValueError(f"crop=[{self.crop[0]:g}, {self.crop[1]:g}] is no range of areas above 0")
        return self


class ProtocolConfig(Section):
    """Training of a student from scratch on a set, tested on the real test split. configs/protocols/ has the literature's."""

    students: tuple[Annotated[str, AfterValidator(check_student)], ...] = Field(default=("convnet-3",), min_length=1)
    """`convnet-DEPTH`, `resnetap-10`, `resnet-18`, `resnet-50`, `resnet-101`, `timm/NAME`: a row of the table each."""
    labels: Literal["hard", "soft"] = "hard"
    """`soft`: those of the teacher, on the fly, for every batch as it is after augmentation."""
    norm: Norm = "instance"
    """Of ConvNets and ResNets."""
    width: int = Field(default=128, ge=1)
    """Channels of every layer of a ConvNet."""
    size: int | None = Field(default=None, ge=8)
    """Height and width of what students see; data.size when unset."""
    test_crop: Fraction = Field(default=1.0, gt=0)
    """Share of a test image's sides that is kept, in its centre (RDED: 0.875)."""
    normalise: Literal["set", "imagenet"] = "set"
    """By mean and deviation of all pixels of the set, or by ImageNet's of each colour."""
    epochs: ByIpc = 300
    """A number, or a table by images per class such as `{1: 3000, 10: 2000}`: up to the bound so many; the last beyond."""
    batch_size: ByIpc = 64
    """Also a number or a table. Never more than the set has images."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.01, gt=0)
    momentum: Fraction = 0.9
    """Of SGD."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """AdamW leaves it off biases and norms."""
    decay: Literal["cosine", "half_cosine", "steps"] = "cosine"
    """By epoch: to 0; to half (RDED); by 5 after two thirds and after five sixths (Minimax)."""
    augment: AugmentConfig = AugmentConfig(max_shift=2)
    cutmix: bool = False
    """On every batch: one permutation, one box, its area from Beta(1, 1)."""
    temperature: float = Field(default=20.0, gt=0)
    """T of the soft labels' loss, KL of the softmaxes at T, without the factor T²."""
    validations: int = Field(default=100, ge=1)
    """Evenly spaced tests; `best` is the best of them, `last` the final one, `val` the one at the best validation accuracy."""
    validate_from: Fraction = Field(default=0.0, lt=1)
    """Share of the epochs before the first of them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the network's arithmetic; weights and losses stay in float32."""


class EncoderTraining(Section):
    """Training of a timm network as a classifier of the training split: φ, or the teacher of soft labels."""

    model: str = "resnet18"
    model_args: dict[str, Any] = Field(default={"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]})
    epochs: int = Field(default=6, ge=1)
    batch_size: int = Field(default=256, ge=1)
    lr: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    label_smoothing: Fraction = 0.1
    augment: AugmentConfig = AugmentConfig(max_shift=2)


class TeacherConfig(Section):
    """Whose labels are soft."""

    weights: str | None = None
    """A classifier that knows the classes: `embedded:NAME`, a file, a timm folder or hub id; unset: trained on the real set."""
    training: EncoderTraining = EncoderTraining()
    trainer: TrainerConfig = TrainerConfig(num_workers=1)


class EvaluationConfig(Section):
    """Every set is scored by every protocol, student and seed: a Ray task each."""

    protocols: dict[Name, ProtocolConfig] = Field(
        default={
            "hard": ProtocolConfig(width=32, epochs=150, validations=3),
        },
        min_length=1,
    )
    """By the name that the table gives them; null removes one."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    val_per_class: int = Field(default=50, ge=0)
    """Real training images of each class, not of the set, that choose the epoch of `val`; 0 leaves it out."""
    teacher: TeacherConfig = TeacherConfig()
    cpus_per_task: float = Field(default=1, gt=0)
    gpus_per_task: float = Field(default=0, ge=0)
    threads_per_task: int = Field(default=1, ge=1)

    @property
    def rows(self) -> dict[str, tuple[str, str]]:
        """Title of each row of the table → its protocol and student."""
        return {f"{name}/{student}": (name, student) for name, p in self.protocols.items() for student in p.students}
