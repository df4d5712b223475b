"""A distillation run: its models, its arms, its stages; and comparisons of many runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from ims3_ray.config.base import Name, Section, canonical, merge
from ims3_ray.config.candidates import PoolConfig, RefineConfig, SamplingConfig, SelectionConfig
from ims3_ray.config.finetune import FinetuneConfig
from ims3_ray.config.work import WorkConfig
from ims3_ray.selection.base import Per

Overridable = Literal["finetune", "sampling", "selection", "pool", "refine"]


class InstabilityConfig(Section):
    """The generator's instability coefficient (Eq. 12) at noise inverted from real images, before and after fine-tuning."""

    images: int = Field(default=3, ge=0)
    """Images it is measured at, spread over the classes; 0 leaves it out."""
    steps: int = Field(default=8, ge=1)
    """Evenly spaced steps of inversion and of sampling."""
    probes: int = Field(default=1, ge=1)
    """Random directions of the Lanczos estimate at each step."""
    lanczos_steps: int = Field(default=6, ge=1)
    """Each costs about four forward passes. Too few overestimate, the same before and after."""
    exact_up_to: int = Field(default=64, ge=0)
    """Latents of at most so many values get the exact determinant."""


class ArmConfig(Section):
    """One way to come to K images per class; all arms share the stages they have in common."""

    title: str
    images: Literal["real", "generated"]
    finetune: bool = False
    select: Literal["first", "random", "s3", "closest", "herding", "k_center", "moments", "confidence", "least_confidence"] = (
        "first"
    )
    """How K images are chosen: docs/selection.md."""
    per: Per = "image"
    """Any K images, or one of the subgroups of K that S3 chooses from. S3 itself always takes a subgroup."""
    refine: bool = False
    """Whether the chosen images are optimised further, as `refine` says."""
    overrides: dict[Overridable, dict[str, Any]] = Field(default={})
    """What this arm does otherwise than the run: values of those sections."""

    @model_validator(mode="after")
    def _consistent(self) -> ArmConfig:
        if self.images == "real" and (self.finetune or self.refine or self.select == "s3"):
            raise ValueError("images: real goes with any select but s3 and without finetune and refine")
        if "images_per_class" in self.overrides.get("selection", {}):
            raise ValueError("overrides.selection.images_per_class: sets of other sizes cannot be compared; set it for the run")
        return self


DEFAULT_ARMS: dict[str, dict[str, Any]] = {
    "random_real": {"title": "Random real", "images": "real", "select": "random"},
    "dit": {"title": "DiT", "images": "generated"},
    "dit_s3": {"title": "DiT + S3", "images": "generated", "select": "s3"},
    "ims3": {"title": "IMS3", "images": "generated", "finetune": True, "select": "s3"},
}


class RunConfig(WorkConfig):
    """One distillation run. The defaults are the embedded demonstration."""

    seed: int = Field(default=0, ge=0)
    """Root of all random numbers of the run, those of the students apart."""
    generator: str = "embedded:fashion-mnist-dit"
    """Weights of the class-conditional DiT: `embedded:NAME`, a file, a diffusers folder or a hub id (docs/weights.md)."""
    autoencoder: str | None = None
    """Autoencoder of a generator of latents: a diffusers folder or a hub id (`stabilityai/sd-vae-ft-ema`); unset for pixels."""
    encoder: str = "embedded:fashion-mnist-phi"
    """φ, the frozen feature encoder: `embedded:NAME`, a file, a folder as timm saves it, a hub id (`timm/resnet18.tv_in1k`)."""
    finetune: FinetuneConfig = FinetuneConfig()
    sampling: SamplingConfig = SamplingConfig()
    pool: PoolConfig = PoolConfig()
    selection: SelectionConfig = SelectionConfig()
    refine: RefineConfig = RefineConfig()
    instability: InstabilityConfig = InstabilityConfig()
    arms: dict[Name, ArmConfig] = Field(default_factory=lambda: {name: ArmConfig(**arm) for name, arm in DEFAULT_ARMS.items()})
    """By the names that results have; null removes one."""
    export: str | None = "ims3"
    """The arm that is exported as the distilled data set."""

    @model_validator(mode="after")
    def _arms_exist(self) -> RunConfig:
        if self.export is not None and self.export not in self.arms:
            raise ValueError(f"export='{self.export}' is no arm; there is: {', '.join(self.arms)}")
        for name, arm in self.arms.items():
            for section in arm.overrides:
                try:
                    self._overridden(arm, section)
                except ValidationError as error:
                    first = error.errors()[0]
                    where = ".".join(["arms", name, "overrides", section, *map(str, first["loc"])])
                    raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error
        for config in (self, *map(self.of_arm, self.arms)):
            config._check_pool(max(self._sizes))
        return self

    @property
    def _sizes(self) -> tuple[int, ...]:
        """Numbers of images per class that are chosen."""
        return (self.selection.images_per_class,)

    def _check_pool(self, k: int) -> None:
        drawn, groups = self.pool.per_class, self.selection.groups
        if drawn is not None and drawn < groups * k:
            raise ValueError(
                f"pool.per_class={drawn} holds fewer than selection.groups·images_per_class = {groups}·{k} = {groups * k} "
                "images; raise it or lower the others"
            )

    def _overridden(self, arm: ArmConfig, key: Overridable) -> Section:
        section: Section = getattr(self, key)
        return type(section).model_validate(merge(canonical(section), arm.overrides[key]))

    def of_arm(self, name: str) -> RunConfig:
        """The run as this arm has it."""
        arm = self.arms[name]
        return self.model_copy(update={key: self._overridden(arm, key) for key in arm.overrides})

    @property
    def pool_size(self) -> int:
        """Candidates per class."""
        return self.pool.per_class or self.selection.groups * self.selection.images_per_class


class CompareConfig(RunConfig):
    """A comparison of arms at several numbers of images per class (`jobs/compare.py`)."""

    name: str = Field(default="compare", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Results go to `{storage}/{name}`."""
    budgets: tuple[int, ...] = Field(default=(1, 10, 50), min_length=1)
    """Images per class, K, instead of selection.images_per_class."""
    draws: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of whole runs, instead of seed: each fine-tunes, samples and chooses anew."""
    arms: dict[Name, ArmConfig] = Field(default={})
    """What is compared; configs/methods/all.yaml has every method."""
    against: str | None = None
    """The arm from which the table counts differences; the first when unset."""
    published: dict[str, dict[str, dict[int, str]]] = Field(default={})
    """Figures of the literature to stand beside: arm → row of the table → images per class → as printed."""
    export: None = None
    """Nothing is exported."""

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
        """The arm from which differences are counted."""
        return self.against or next(iter(self.arms))

    def at(self, images_per_class: int, draw: int) -> RunConfig:
        """One of the runs that are compared."""
        selection = self.selection.model_copy(update={"images_per_class": images_per_class})
        return self.model_copy(update={"selection": selection, "seed": draw})
