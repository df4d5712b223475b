"""A distillation run: its data, models and stages."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from ims3_ray.config.base import Fraction, Section
from ims3_ray.config.finetune import FinetuneConfig
from ims3_ray.diffusion.sampling import SamplerName
from ims3_ray.selection.base import Per


class DataConfig(Section):
    path: str = "embedded:fashion-mnist"
    """`embedded:NAME`, a folder (IDX files, Parquet, or one folder per class) or a Parquet file."""
    train_split: str = "train"
    test_path: str | None = None
    """Where the test split lies if not under `path`."""
    test_split: str = "test"
    size: int = Field(default=28, gt=0)
    """Height and width to which images are scaled and cropped."""
    channels: Literal[1, 3] = 1
    classes: tuple[str, ...] | None = Field(default=None, min_length=2)
    """Names of the classes to distil; all of them when unset."""
    unit_size: int = Field(default=500, ge=1)
    """Images per shard of the encoded data set."""


class SamplingConfig(Section):
    """Guided sampling of candidates."""

    sampler: SamplerName = "ddim"
    """`ddim` (Eq. 1, deterministic), `ddpm` (ancestral, as the published baselines: with the learned variance of generators
    that have one), `dpm++2m` (DPM-Solver++, second order: less error in as many steps)."""
    steps: int = Field(default=25, ge=1, lt=1000)
    """Evenly spaced denoising steps."""
    cfg_scale: float = Field(default=2.0, ge=1)
    """Classifier-free guidance; 1 is none."""
    cfg_channels: int | None = Field(default=None, ge=1)
    """Guidance acts on the first so many channels (DiT uses 3 of 4); all of them when unset."""
    cfg_interval: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Guidance acts on this part of the timesteps (0 is clean, 1 is noise); elsewhere a step costs half."""
    clip: bool = True
    """Clamp each predicted clean image to [-1, 1]; right for pixels, wrong for latents."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of weights and arithmetic of generator and autoencoder; the steps themselves stay in float32."""
    compile: bool = False
    """torch.compile each transformer block (all share one compilation); pays off after some minutes of GPU work."""
    unit_size: int = Field(default=25, ge=1)
    """Images per unit of work, one batch. The batch shape is fixed, so a unit done again gives the same bytes."""

    @model_validator(mode="after")
    def _interval(self) -> SamplingConfig:
        low, high = self.cfg_interval
        if low > high:
            raise ValueError(f"cfg_interval=[{low:g}, {high:g}] ends before it starts; swap the two")
        return self


class PoolConfig(Section):
    """The candidates, addressed by class and index: a larger one extends what is there."""

    per_class: int | None = Field(default=None, ge=1)
    """Candidates drawn per class; selection.groups times images_per_class when unset."""
    store: Literal["png", "latents"] = "png"
    """`latents` keeps a tenth of the bytes and decodes the chosen ones again; needs an autoencoder."""
    mix_hardware: bool = False
    """Whether images of different devices or PyTorch versions may share a pool: they differ in their last bits."""


class ActorsConfig(Section):
    """The Ray Data actor pool that decodes, generates and embeds images."""

    count: int = Field(default=2, ge=1)
    cpus: float = Field(default=1, gt=0)
    """CPUs reserved for each actor."""
    gpus: float = Field(default=0, ge=0)
    threads: int = Field(default=1, ge=1)
    """PyTorch threads of each actor."""
    encoders: int = Field(default=2, ge=1)
    """Threads of each actor that encode and write images while its device works on the next unit."""
    max_attempts: int = Field(default=3, ge=1)
    """Passes over units of work that failed before the stage gives up."""


class SelectionConfig(Section):
    """Selective Subgroup Sampling (section 4.2, Eq. 8-11)."""

    images_per_class: int = Field(default=10, ge=1)
    """K, images per class of the distilled set and per candidate subgroup."""
    groups: int = Field(default=5, ge=1)
    """G, candidate subgroups per class."""
    alpha: float = Field(default=0.4, ge=0)
    """Weight of nearness to the own class's real centroid (Eq. 10). Only α : β matters."""
    beta: float = Field(default=0.9, ge=0)
    """Weight of distance from the other classes' candidates (Eq. 10)."""
    coupling: Literal["pool", "selected"] = "pool"
    """`pool` is Eq. 10 as printed; `selected` repels from the selected groups only."""
    references_per_class: int | None = Field(default=None, ge=1)
    """K_i of Eq. 8, drawn at random by the run's seed; all images when unset."""
    references: Literal["real", "generated"] = "real"
    """What the reference centroids are made of: real images (Eq. 8), or the class's candidates (Table 13)."""

    @model_validator(mode="after")
    def _possible(self) -> SelectionConfig:
        if self.alpha == 0 and self.beta == 0:
            raise ValueError("alpha and beta are both 0, so every subgroup scores the same; raise one of them")
        return self


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


class EvaluationConfig(Section):
    """Training of a student from scratch on a distilled set, tested on the real test split."""

    width: int = Field(default=32, ge=1)
    """Channels of every layer; the field's usual 128 is for GPUs."""
    depth: int = Field(default=3, ge=1)
    epochs: int = Field(default=150, ge=1)
    batch_size: int = Field(default=64, ge=1)
    lr: float = Field(default=0.01, gt=0)
    momentum: Fraction = 0.9
    weight_decay: float = Field(default=5e-4, ge=0)
    max_shift: int = Field(default=2, ge=0)
    """Augmentation: random shift by up to so many pixels."""
    flip: bool = False
    """Augmentation: random horizontal mirroring."""
    validations: int = Field(default=3, ge=1)
    """Evenly spaced tests during training; `best` is the best of them, `last` the final one."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    cpus_per_task: float = Field(default=1, gt=0)
    gpus_per_task: float = Field(default=0, ge=0)
    threads_per_task: int = Field(default=1, ge=1)


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

    @model_validator(mode="after")
    def _consistent(self) -> ArmConfig:
        if self.images == "real" and (self.finetune or self.select == "s3"):
            raise ValueError("images: real goes with any select but s3 and without finetune")
        return self


DEFAULT_ARMS: dict[str, dict[str, Any]] = {
    "random_real": {"title": "Random real", "images": "real", "select": "random"},
    "dit": {"title": "DiT", "images": "generated"},
    "dit_s3": {"title": "DiT + S3", "images": "generated", "select": "s3"},
    "ims3": {"title": "IMS3", "images": "generated", "finetune": True, "select": "s3"},
}


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking URI; a sqlite file in the run folder when unset."""
    experiment: str = "ims3-ray"


class ClusterConfig(Section):
    address: str | None = None
    """Ray address; unset joins the cluster of `RAY_ADDRESS` or of the job, or starts Ray on this machine."""
    wait_s: float = Field(default=0, ge=0)
    """How long to wait for an autoscaling cluster to grow to what the plan needs."""
    gpu_price: float | None = Field(default=None, ge=0)
    """What a GPU costs an hour: progress then says what was spent and what is to come. In any currency."""
    cpu_price: float | None = Field(default=None, ge=0)
    """What a CPU costs an hour, beside GPUs."""


class RunConfig(Section):
    """One distillation run. The defaults are the embedded demonstration."""

    name: str = Field(default="demo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Results go to `{storage}/{name}`."""
    storage: str = "runs"
    """Folder or URI (`s3://…`, `gs://…`) that holds results and the artifacts shared by all runs."""
    seed: int = Field(default=0, ge=0)
    """Root of all random numbers of the run, those of the students apart."""
    data: DataConfig = DataConfig()
    generator: str = "embedded:fashion-mnist-dit"
    """Weights of the class-conditional DiT: `embedded:NAME`, a file, a diffusers folder or a hub id (docs/weights.md)."""
    autoencoder: str | None = None
    """Autoencoder of a generator of latents: a diffusers folder or a hub id (`stabilityai/sd-vae-ft-ema`); unset for pixels."""
    encoder: str = "embedded:fashion-mnist-phi"
    """φ, the frozen feature encoder: `embedded:NAME`, a file, a folder as timm saves it, a hub id (`timm/resnet18.tv_in1k`)."""
    finetune: FinetuneConfig = FinetuneConfig()
    sampling: SamplingConfig = SamplingConfig()
    pool: PoolConfig = PoolConfig()
    actors: ActorsConfig = ActorsConfig()
    selection: SelectionConfig = SelectionConfig()
    instability: InstabilityConfig = InstabilityConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    arms: dict[str, ArmConfig] = Field(
        default_factory=lambda: {name: ArmConfig(**arm) for name, arm in DEFAULT_ARMS.items()}, min_length=1
    )
    export: str = "ims3"
    """The arm that is exported as the distilled data set."""
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _arms_exist(self) -> RunConfig:
        if self.name == "artifacts":
            raise ValueError("name 'artifacts' is taken by the shared artifacts; choose another")
        if self.export not in self.arms:
            raise ValueError(f"export='{self.export}' is no arm; there is: {', '.join(self.arms)}")
        s, drawn = self.selection, self.pool.per_class
        if drawn is not None and drawn < s.groups * s.images_per_class:
            raise ValueError(
                f"pool.per_class={drawn} holds fewer than selection.groups·images_per_class = "
                f"{s.groups}·{s.images_per_class} = {s.groups * s.images_per_class} images; raise it or lower the others"
            )
        return self

    @property
    def pool_size(self) -> int:
        """Candidates per class."""
        return self.pool.per_class or self.selection.groups * self.selection.images_per_class
