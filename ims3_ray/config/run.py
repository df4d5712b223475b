"""A distillation run: its models, its arms, its stages; and comparisons of many runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator

from ims3_ray.config.base import Fraction, Name, Section, Seeds, Text, canonical, distinct, merge
from ims3_ray.config.candidates import PoolConfig, SamplingConfig, SelectionConfig, SynthesisConfig
from ims3_ray.config.finetune import AdoptConfig, FinetuneConfig
from ims3_ray.config.messages import inner
from ims3_ray.config.work import WorkConfig
from ims3_ray.selection.base import Per, Selector
from ims3_ray.synthesis.base import Synthesis

Overridable = Literal[
    "finetune", "sampling", "selection", "pool", "synthesis", "data", "encoder", "generator", "autoencoder"
]  # fmt: skip


class InstabilityConfig(Section):
    """Measurement of the generator's instability coefficient (Eq. 12) at noise inverted from real images, before and after
    fine-tuning."""

    images: int = Field(default=3, ge=0)
    """Number of real images at which the coefficient is measured, spread over the classes; 0 skips the measurement."""
    steps: int = Field(default=8, ge=1, le=1000)
    """Number of steps of inversion and of sampling, evenly spaced over the timesteps."""
    probes: int = Field(default=1, ge=1)
    """Number of random directions of the Lanczos estimate at each step."""
    lanczos_steps: int = Field(default=6, ge=1)
    """Number of Lanczos steps; each costs about four forward passes. Too few overestimate the coefficient, before and after
    fine-tuning alike."""
    exact_up_to: int = Field(default=64, ge=0)
    """Largest number of values of a latent for which the determinant is computed exactly instead of estimated."""


INSTABILITY = tuple(f"instability.{key}" for key in InstabilityConfig.model_fields)
"""The keys of this measurement, which `ims3 distill` alone makes."""


class ArmConfig(Section):
    """One way to obtain K images per class, in four slots: `images`, `select`, `synthesise` and `labels`. Arms share the stages
    that they have in common."""

    title: Text
    """Name of the arm in tables and reports."""
    images: Literal["real", "generated", "given", "none"]
    """Source of the images: training images (`real`), samples of the generator (`generated`), an existing set at `path`
    (`given`), or none, when `synthesise` makes images from nothing (`none`)."""
    path: Text | None = None
    """The set that `images: given` reads: a folder, a Parquet file or a hub id. `{k}` in it stands for the number of images per
    class."""
    finetune: bool = False
    """Whether the generator is fine-tuned with the settings in `finetune`."""
    select: str = "first"
    """Selector that chooses the K images of each class: docs/selection.md. A given set is used unchanged."""
    per: Per = "image"
    """What the selector chooses: any K images (`image`), or one of the subgroups of K images (`group`). Selectors that compare
    all classes, such as `s3`, always choose a subgroup."""
    synthesise: str | None = None
    """Method that makes the set from the chosen or given images, or from nothing, with its settings in `synthesis`; none when
    unset."""
    labels: Literal["hard", "soft"] = "hard"
    """`hard`: each image has its class as label. `soft`: the teacher's logits are stored with each image as well."""
    weights: Literal["equal", "clusters"] = "equal"
    """Weights of the images in the loss of students. `clusters` (DDOQ): the weight of an image is the number of real images in
    the cluster that it was sampled from or towards."""
    overrides: dict[Overridable, Any] = Field(default={})
    """Settings in which this arm differs from the run: values of finetune, sampling, selection, pool and synthesis, another
    encoder, generator or autoencoder, or data.size."""

    @field_validator("select")
    @classmethod
    def _known_selector(cls, name: str) -> str:
        return Selector.registry.checked(name)

    @field_validator("synthesise")
    @classmethod
    def _known_method(cls, name: str | None) -> str | None:
        return None if name is None else Synthesis.registry.checked(name)

    @model_validator(mode="after")
    def _consistent(self) -> ArmConfig:
        if self.finetune and self.images != "generated":
            raise ValueError("finetune=true changes the generator, so it needs images: generated")
        if self.selector.whole and (self.images != "real" or self.synthesise is not None):
            raise ValueError(
                f"select: {self.select} takes the whole training split as it is; set images: real and leave synthesise out"
            )
        if self.images in ("given", "none") and self.select != "first":
            raise ValueError(f"images: {self.images} leaves nothing to select; leave select out")
        if (self.path is not None) != (self.images == "given"):
            raise ValueError("images: given and path go together: give both or neither")
        if self.images == "none" and self.synthesise is None:
            raise ValueError("images: none needs a method that makes some; set synthesise")
        if self.method is not None and ("nothing" if self.images == "none" else "set") not in self.method.starts:
            fix = "set images: none" if self.images != "none" else "choose images, as in images: real with select: random"
            raise ValueError(f"synthesise: {self.synthesise} does not start from images: {self.images}; {fix}")
        if self.method is not None and "generator" in self.method.needs and self.images != "generated":
            raise ValueError(f"synthesise: {self.synthesise} works on the generator's latents, so it needs images: generated")
        if self.weights == "clusters" and (self.images != "generated" or self.synthesise is not None):
            raise ValueError(
                "weights: clusters is for samples of the generator; leave synthesise out and set images: generated"
            )
        if "images_per_class" in self._section("selection"):
            raise ValueError("overrides.selection.images_per_class: sets of other sizes cannot be compared; set it for the run")
        if other := set(self._section("data")) - {"size"}:
            raise ValueError(f"overrides.data.{min(other)}: arms share their data; of data only size can differ")
        if self._section("data") and self.images == "real":
            raise ValueError("overrides.data.size: real images have the size that students are tested at; set it for the run")
        return self

    def _section(self, key: Overridable) -> dict[str, Any]:
        found = self.overrides.get(key, {})
        return found if isinstance(found, dict) else {}

    @property
    def selector(self) -> type[Selector]:
        """The component that ``select`` names."""
        return Selector.registry[self.select]

    @property
    def method(self) -> type[Synthesis] | None:
        """The component that ``synthesise`` names."""
        return Synthesis.registry[self.synthesise] if self.synthesise else None


BEST = "best"
"""Value of ``export`` that lets held-out images choose the arm."""
DEFAULT_ARMS: dict[str, dict[str, Any]] = {
    "random_real": {"title": "Random real", "images": "real", "select": "random"},
    "dit": {"title": "DiT", "images": "generated"},
    "dit_s3": {"title": "DiT + S3", "images": "generated", "select": "s3"},
    "ims3": {"title": "IMS3", "images": "generated", "finetune": True, "select": "s3"},
}


class RecognitionConfig(Section):
    """What happens if φ does not recognise the samples of a generator. The share of samples that are closer to the mean real
    image of their class than to that of another class (of at most 20) is divided by the same share of real images."""

    stop_below: Fraction = 0.5
    """The run ends if the quotient is smaller."""
    warn_below: Fraction = 0.8
    """A line is printed if the quotient is smaller."""


class RunConfig(WorkConfig):
    """One distillation run. The defaults take the embedded data and weights."""

    seed: int = Field(default=0, ge=0)
    """Seed of all random numbers of the run, except those of the students."""
    generator: Text = "embedded:fashion-mnist-dit"
    """Weights of the generator: `embedded:NAME`, a file, a diffusers folder of DiT or Stable Diffusion, or a hub id
    (docs/weights.md)."""
    autoencoder: Text | None = None
    """Autoencoder of a generator that works on latents: a diffusers folder, a hub id (`stabilityai/sd-vae-ft-ema`) or a file
    that `ims3 pretrain` made. When unset, the one in the generator's own folder, if it has one; a generator of pixels needs
    none."""
    encoder: Text = "embedded:fashion-mnist-phi"
    """φ, the frozen feature encoder: `embedded:NAME`, a file, a folder as timm saves it, a hub id (`timm/resnet18.tv_in1k`), or
    `teacher`, the classifier of evaluation.teacher, which is trained on the real images if it names no weights."""
    adopt: AdoptConfig | None = None
    """How the generator is taught the classes of the data that it does not know, before it is used; when unset, such classes
    are refused."""
    finetune: FinetuneConfig = FinetuneConfig()
    sampling: SamplingConfig = SamplingConfig()
    pool: PoolConfig = PoolConfig()
    selection: SelectionConfig = SelectionConfig()
    synthesis: SynthesisConfig = SynthesisConfig()
    instability: InstabilityConfig = InstabilityConfig()
    quality: RecognitionConfig = RecognitionConfig()
    stages: dict[Name, dict[str, Any]] = Field(default={})
    """Kinds of stage that run in addition to those that the arms need, with their settings: docs/extending.md."""
    arms: dict[Name, ArmConfig] = Field(default_factory=lambda: {name: ArmConfig(**arm) for name, arm in DEFAULT_ARMS.items()})
    """Arms by name; the results show these names. `null` removes an arm."""
    export: str | None = BEST
    """The arm whose set is exported as the distilled data set; with `best` the one whose students are most accurate on
    held-out training images, on average over the rows of the table. With null nothing is exported."""

    @model_validator(mode="after")
    def _arms_exist(self) -> RunConfig:
        if self.export not in (None, BEST, *self.arms):
            raise ValueError(f"export='{self.export}' is no arm; there is: {', '.join(self.arms)}, or {BEST}")
        titles = {arm.title: name for name, arm in self.arms.items()}
        if len(titles) < len(self.arms):
            name = next(name for name, arm in self.arms.items() if titles[arm.title] != name)
            title = self.arms[name].title
            raise ValueError(f"arms '{name}' and '{titles[title]}' have the title '{title}'; give each one of its own")
        for name, arm in self.arms.items():
            for section in arm.overrides:
                try:
                    self._overridden(arm, section)
                except ValidationError as error:
                    raise ValueError(inner(type(getattr(self, section)), error, "arms", name, "overrides", section)) from error
        for config in (self, *map(self.of_arm, self.arms)):
            config._check_pool(max(self._sizes))
        return self

    @property
    def _sizes(self) -> tuple[int, ...]:
        """The numbers of images per class for which sets are made, which the option :attr:`size_key` holds."""
        return (self.selection.images_per_class,)

    def _check_pool(self, k: int) -> None:
        drawn, groups = self.pool.per_class, self.selection.groups
        if drawn is not None and drawn < groups * k:
            raise ValueError(
                f"pool.per_class={drawn} holds fewer than {groups * k} images, which are selection.groups={groups} times "
                f"{self.size_key}={k}; raise it or lower the others"
            )

    def _overridden(self, arm: ArmConfig, key: Overridable) -> Any:
        here, there = getattr(self, key), arm.overrides[key]
        if isinstance(here, Section):
            if not isinstance(there, Mapping):
                raise ValueError(f"overrides.{key} has keys of its own, so it cannot be {there!r}; write them under it")
            return type(here).model_validate(merge(canonical(here), there))
        if there is None and key == "autoencoder":
            return None
        if not isinstance(there, str):
            raise ValueError(f"overrides.{key} names weights, so it must be text, not {there!r}")
        return there

    def of_arm(self, name: str) -> RunConfig:
        """The config of the run with the overrides of this arm."""
        arm = self.arms[name]
        return self.model_copy(update={key: self._overridden(arm, key) for key in arm.overrides})

    @property
    def pool_size(self) -> int:
        """Number of candidates per class."""
        return self.pool.per_class or self.selection.groups * self.selection.images_per_class


class CompareConfig(RunConfig):
    """A comparison of arms at several numbers of images per class (`ims3 compare`)."""

    job: ClassVar[str] = "compare"
    size_key: ClassVar[str] = "budgets"
    replaced: ClassVar[Mapping[str, str]] = {
        "seed": "draws", "selection.images_per_class": "budgets", **dict.fromkeys(INSTABILITY, ""),
    }  # fmt: skip
    name: str = Field(default="compare", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Results go to `{storage}/{name}`; `-compare` is added to a name without this word."""
    budgets: Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(distinct)] = Field(
        default=(1, 10, 50), min_length=1
    )
    """Numbers of images per class (K) to compare, in place of selection.images_per_class."""
    draws: Seeds = (0,)
    """Seeds of whole runs, in place of `seed`: fine-tuning, sampling and selection are repeated for each seed."""
    arms: dict[Name, ArmConfig] = Field(default={})
    """Arms to compare; configs/methods/all.yaml has those that need no Stable Diffusion."""
    against: str | None = None
    """Arm to which the table gives the differences of the others; the first arm when unset."""
    published: dict[str, dict[str, dict[int, str]]] = Field(default={})
    """Published accuracies that the table shows beside the measured ones: arm → row of the table → images per class → the text
    as printed."""
    export: None = None
    """Always null: a comparison exports nothing."""

    @model_validator(mode="after")
    def _base_exists(self) -> CompareConfig:
        if self.against is not None and self.against not in self.arms:
            raise ValueError(f"against='{self.against}' is no arm; there is: {', '.join(self.arms)}")
        return self

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.budgets

    @property
    def base(self) -> str:
        """The arm to which the differences of the others are computed."""
        return self.against or next(iter(self.arms))

    def at(self, images_per_class: int, draw: int) -> RunConfig:
        """The config of the run with these images per class and the seed ``draw``."""
        selection = self.selection.model_copy(update={"images_per_class": images_per_class})
        return self.model_copy(update={"selection": selection, "seed": draw})
