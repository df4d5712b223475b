"""How sets of images are evaluated: the protocols by which students are trained on a set, and the teacher of soft labels."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ims3_ray.config.base import Fraction, Name, Section, Seeds, distinct
from ims3_ray.config.finetune import TrainerConfig
from ims3_ray.data.siamese import Family

Count = Annotated[int, Field(ge=1)]
ByIpc = Count | Annotated[dict[Count, Count], Field(min_length=1)]
"""A number, or a table that maps images per class to the number. Each key of the table is an upper bound: the entry with the
smallest bound that is not exceeded applies, and beyond the largest bound the entry of the largest."""


def for_ipc(value: ByIpc, ipc: int) -> int:
    """The value of a :data:`ByIpc` for ``ipc`` images per class."""
    if isinstance(value, int):
        return value
    return next((value[bound] for bound in sorted(value) if ipc <= bound), value[max(value)])


class AugmentConfig(Section):
    """Augmentations of a batch of training images, applied on the device of the batch, in this order."""

    rand_augment: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=0, le=30)]] | None = None
    """Number of operations of torchvision's RandAugment for each image, and their magnitude; none when unset. It processes one
    image at a time, which takes some milliseconds an image."""

    shuffle_patches: int = Field(default=1, ge=1)
    """Number of patches per side into which each image is cut; the patches are then shuffled (RDED: 2). 1 leaves the image
    whole."""
    crop: tuple[Fraction, Fraction] | None = None
    """Smallest and largest share of the area that RandomResizedCrop keeps; no crop when unset."""
    max_shift: int = Field(default=0, ge=0)
    """Largest random shift in each direction, in pixels."""
    flip: bool = False
    """Whether images are mirrored horizontally at random."""
    jitter: Fraction = 0.0
    """Strength of ColorJitter: brightness, contrast and saturation change, in random order, by factors from 1 ± this value."""
    lighting: float = Field(default=0.0, ge=0)
    """Standard deviation of AlexNet's colour noise along ImageNet's principal components."""

    dsa: tuple[Family | Annotated[tuple[Family, ...], Field(min_length=1)], ...] = ()
    """Families of DSA's augmentations, which are applied to normalised images: `color`, `crop`, `cutout`, `flip`, `scale`,
    `rotate`. Digits and other images that must not be mirrored go without `flip`."""
    dsa_every: bool = False
    """Whether every entry of `dsa` is applied to a batch, instead of one that is drawn for it (DSA). An entry may then be a
    list of families, of which one is drawn for each batch (IDC: `[flip, color, [crop, scale, rotate]]`)."""

    @model_validator(mode="after")
    def _area(self) -> AugmentConfig:
        if self.crop is not None and not 0 < self.crop[0] <= self.crop[1]:
            raise ValueError(f"crop=[{self.crop[0]:g}, {self.crop[1]:g}] is no range of areas above 0")
        if self.dsa_every and not self.dsa:
            raise ValueError("dsa_every=true has no effect without dsa; name its families, or leave it out")
        if not self.dsa_every and any(not isinstance(entry, str) for entry in self.dsa):
            raise ValueError("dsa has a list of families as an entry, which needs dsa_every=true")
        return self


class ProtocolConfig(Section):
    """How a student is trained from scratch on a set and tested on the real test split. configs/protocols/ holds the protocols
    of the literature."""

    students: Annotated[tuple[str, ...], AfterValidator(distinct)] = Field(default=("convnet-3",), min_length=1)
    """Students to train: `convnet-DEPTH`, `resnetap-10`, `resnet-18`, `resnet-50`, `resnet-101` or `timm/NAME`. Each is a row
    of the results table."""
    labels: Literal["hard", "soft", "stored", "stored_batches"] = "hard"
    """Labels that students learn. `hard`: the class. `soft`: the outputs of the teacher, computed for every batch after its
    augmentation. `stored`: the soft labels that are stored with the set. `stored_batches`: as `soft`, but all students see the
    same batches with the same augmentation, whose labels are computed once and stored in half precision (FKD, SRe2L)."""
    norm: Literal["instance", "batch"] = "instance"
    """Kind of normalisation layers in ConvNets and ResNets."""
    width: int = Field(default=128, ge=1)
    """Number of channels of every layer of a ConvNet."""
    size: int | None = Field(default=None, ge=8)
    """Height and width of the images that students are trained and tested on, in pixels; data.size when unset."""
    pad_to: int | None = Field(default=None, ge=8)
    """Height and width to which images are padded before the network, with the mean colour (DC, DSA, DM and IDC pad
    images of 28 pixels to 32); no padding when unset."""
    test_crop: Fraction = Field(default=1.0, gt=0)
    """Share of the height and width of a test image that a central crop keeps (RDED: 0.875). Test images are read from the data
    set at the size that makes the crop as large as `size`."""
    normalise: Literal["set", "imagenet", "real"] = "set"
    """Statistics that normalise the images: `set` uses one mean and standard deviation of all pixels of the set, `real` those
    of each colour of the real training images (of some images of up to 50 classes), `imagenet` those of each colour of
    ImageNet."""
    epochs: ByIpc = 300
    """Number of epochs, or a table by images per class: `{1: 3000, 10: 2000}` means 3000 epochs for up to 1 image per class and
    2000 for up to 10. More images per class use the last entry."""
    batch_size: ByIpc = 64
    """Number of images per batch, or a table by images per class as in `epochs`. A batch never has more images than the set."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Optimiser of the students: SGD with momentum, or AdamW."""
    lr: float = Field(default=0.01, gt=0)
    """Learning rate at the start."""
    momentum: Fraction = 0.9
    """Momentum of SGD."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay. AdamW does not apply it to biases and normalisation layers."""
    decay: Literal["cosine", "half_cosine", "steps", "halfway"] = "cosine"
    """Decay of the learning rate, by epoch: `cosine` to 0; `half_cosine` to half of its start (RDED); `steps` divides it by 5
    after two thirds and again after five sixths of the epochs (Minimax); `halfway` divides it by 10 after half of the epochs
    and one more (DC, DSA, DM)."""
    augment: AugmentConfig = AugmentConfig(max_shift=2)
    cutmix: Fraction = 0.0
    """Probability with which CutMix is applied to a batch (`true` is 1), with one permutation and one box per batch; the share
    of the image that the box covers is drawn from Beta(1, 1)."""
    second_pass: bool = False
    """Whether the student sees each batch twice, the first time without learning from it: the running statistics of batch norm
    are then updated twice a step, as in RDED's code, whose CutMix changes the batch before both passes."""
    temperature: float = Field(default=20.0, gt=0)
    """Temperature T of the soft-label loss, the KL divergence of the softmaxes at T, without the factor T²."""
    validations: int = Field(default=100, ge=1)
    """Number of evenly spaced tests during training. `best` is the best test accuracy among them, `last` the one after the last
    epoch, `val` the one at the epoch with the best validation accuracy."""
    validate_from: Fraction = Field(default=0.0, lt=1)
    """Share of the epochs that pass before the evenly spaced tests begin."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Number format of the student's arithmetic; weights and losses stay in float32."""


def for_colour_alone(augment: AugmentConfig, normalise: str = "set") -> str | None:
    """The setting that grey images cannot have, as ``key=value``; None if there is none."""
    if normalise == "imagenet":
        return "normalise=imagenet"
    return f"augment.lighting={augment.lighting:g}" if augment.lighting else None


class EncoderTraining(Section):
    """Training of a timm network as a classifier of the training split. It becomes the encoder φ or the teacher of soft
    labels."""

    model: str = "resnet18"
    """Name of the network in timm."""
    model_args: dict[str, Any] = Field(default={"layers": [1, 1, 1, 1], "channels": [32, 64, 128, 256]})
    """Arguments with which timm builds the network. A given value replaces the default as a whole, and a given `model` without
    arguments is built as it is published: the default makes a ResNet-18 of a ninth of its size."""
    epochs: int = Field(default=6, ge=1)
    """Number of passes over the real training images."""
    batch_size: int = Field(default=256, ge=1)
    """Number of images in the global batch, over all workers."""
    lr: float = Field(default=2e-3, gt=0)
    """Largest learning rate of AdamW, which rises to it over 30 % of the steps and then falls (one cycle)."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of AdamW."""
    label_smoothing: Fraction = 0.1
    """Share of the label that is spread evenly over all classes."""
    augment: AugmentConfig = AugmentConfig(max_shift=2)

    @model_validator(mode="before")
    @classmethod
    def _own_arguments(cls, values: Any) -> Any:
        """A network that is named without arguments gets none of the default's."""
        if isinstance(values, dict) and "model" in values and "model_args" not in values:
            return {**values, "model_args": {}}
        return values


class TeacherConfig(Section):
    """The teacher, a classifier whose outputs are the soft labels."""

    weights: str | None = None
    """Weights of a classifier of these classes: `embedded:NAME`, a file, a folder as timm saves it or a hub id. When unset, a
    classifier is trained on the real training images."""
    training: EncoderTraining = EncoderTraining()
    trainer: TrainerConfig = TrainerConfig(num_workers=1)


HELD_OUT_PER_CLASS, HELD_OUT = 50, 10_000
"""Numbers of training images of each class, and of all, that are held out unless the config says another number."""


class EvaluationConfig(Section):
    """How sets are scored. Every combination of a set, a protocol, a student and a seed is one Ray task."""

    protocols: dict[Name, ProtocolConfig] = Field(
        default={
            "hard": ProtocolConfig(width=32, epochs=150, validations=3),
        },
        min_length=1,
    )
    """Protocols by name; the results table shows these names. `null` removes a protocol."""
    seeds: Seeds = (0, 1, 2)
    """Seeds of the students: each set trains one student for each seed."""
    val_per_class: int | None = Field(default=None, ge=0)
    """Number of real training images of each class that choose the epoch of `val`; images of the set are left out. 0 means that
    there is no `val`. When unset, 50, or fewer for more than 200 classes, so that there are at most 10,000 images."""
    teacher: TeacherConfig = TeacherConfig()
    cpus_per_task: float = Field(default=1, gt=0)
    """CPUs reserved for the training of a student."""
    gpus_per_task: float = Field(default=0, ge=0)
    """GPUs reserved for the training of a student; a fraction lets several share one."""
    threads_per_task: int = Field(default=1, ge=1)
    """Number of PyTorch threads of the training of a student."""

    def held_out(self, classes: int) -> int:
        """Number of training images of each of so many classes that are held out."""
        if self.val_per_class is not None:
            return self.val_per_class
        return max(1, min(HELD_OUT_PER_CLASS, HELD_OUT // classes))

    @property
    def rows(self) -> dict[str, tuple[str, str]]:
        """Title of each row of the results table → its protocol and student."""
        return {f"{name}/{student}": (name, student) for name, p in self.protocols.items() for student in p.students}
