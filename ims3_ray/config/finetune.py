"""Fine-tuning: what is minimised, how, and on which workers."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from ims3_ray.config.base import Fraction, Section, reserved


class TrainerConfig(Section):
    """Ray Train: how many workers, with what."""

    num_workers: int = Field(default=2, ge=1)
    max_workers: int | None = Field(default=None, ge=1)
    """Elastic: as many workers as there is room for, from num_workers up to this, changed while it runs."""
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: float = Field(default=0, ge=0)
    threads_per_worker: int = Field(default=1, ge=1)
    max_failures: int = Field(default=3, ge=0)
    """Times that Ray Train restarts the workers from the last checkpoint."""

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


class DiffusionObjective(Section):
    """L_Diff (Eq. 6)."""

    weight: float = Field(default=1.0, ge=0)
    variance: bool = False
    """Add the variational bound that trains a learned variance (generators with `learn_sigma`, as DiT's release)."""


class InversionMatchingObjective(Section):
    """L_IM as the paper prints it (Eq. 5, Algorithm 1)."""

    weight: float = Field(default=0.002, ge=0)
    """λ_IM of Eq. 7; 0 leaves the term out."""
    n_steps: int = Field(default=2, ge=1)
    """Inversion steps from z_0 to each sample's own t (N of Eq. 3)."""
    grad_steps: int = Field(default=1, ge=1)
    """The last so many steps carry the gradient; without any, L_IM has none."""
    similarity: Literal["cosine", "l1", "l2"] = "cosine"
    """How z_inv is compared with z_t (Table 7)."""

    @model_validator(mode="after")
    def _grad_steps_within(self) -> InversionMatchingObjective:
        if self.grad_steps > self.n_steps:
            raise ValueError(f"grad_steps={self.grad_steps} exceeds n_steps={self.n_steps}; lower it")
        return self


class ReleasedObjective(Section):
    """L_IM as the authors' released code computes it; see docs/method.md."""

    weight: float = Field(default=0.0, ge=0)


class MinimaxObjective(Section):
    """The two terms of Minimax diffusion, with per-class memories of latents."""

    representativeness: float = Field(default=0.0, ge=0)
    """Weight λ_r; Minimax uses 0.002."""
    diversity: float = Field(default=0.0, ge=0)
    """Weight λ_d; Minimax uses 0.008."""
    memory: int = Field(default=64, ge=1)
    """Latents remembered per class, real and predicted each."""
    shared: bool = False
    """One memory for all workers instead of one each."""


class ObjectivesConfig(Section):
    """What fine-tuning minimises: the weighted sum of these. A weight of 0 leaves a term out and costs nothing."""

    diffusion: DiffusionObjective = DiffusionObjective()
    inversion_matching: InversionMatchingObjective = InversionMatchingObjective()
    inversion_matching_released: ReleasedObjective = ReleasedObjective()
    minimax: MinimaxObjective = MinimaxObjective()

    @model_validator(mode="after")
    def _something(self) -> ObjectivesConfig:
        minimax = self.minimax.representativeness + self.minimax.diversity
        if self.diffusion.weight + self.inversion_matching.weight + self.inversion_matching_released.weight + minimax == 0:
            raise ValueError("every objective has weight 0, so there is nothing to learn; set diffusion.weight=1")
        return self

    @property
    def title(self) -> str:
        """The terms that are on."""
        minimax = self.minimax.representativeness + self.minimax.diversity
        terms = {
            "diffusion": self.diffusion.weight, "IM": self.inversion_matching.weight,
            "IM as released": self.inversion_matching_released.weight, "minimax": minimax,
        }  # fmt: skip
        return " + ".join(name for name, weight in terms.items() if weight)

    @property
    def couple_samples(self) -> bool:
        """Whether a term compares images of a batch with each other, so that it matters how a batch is parted."""
        minimax = self.minimax.representativeness + self.minimax.diversity
        return self.inversion_matching_released.weight + minimax > 0


class FinetuneConfig(Section):
    """Fine-tuning of the generator (section 4.1, Algorithm 1)."""

    steps: int | None = Field(default=120, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    """Passes over the images, instead of `steps` (set that to null)."""
    batch_size: int = Field(default=32, ge=1)
    """Global batch: all workers together."""
    accumulate: int = Field(default=1, ge=1)
    """Each worker takes its part of a batch in so many pieces and adds their gradients up: less memory, same step."""
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    parameters: Literal["difffit", "all"] = "difffit"
    """What is trained: DiffFit's biases, norms, label table and scale vectors, or everything."""
    scaled_blocks: int = Field(default=14, ge=0)
    """DiffFit puts scale vectors γ into the first so many blocks."""
    objectives: ObjectivesConfig = ObjectivesConfig()
    flip: bool = False
    """Mirror half of the images at random; right for photographs, wrong for digits."""
    label_dropout: Fraction = 0.1
    """Share of samples that L_Diff sees without their class, as classifier-free guidance needs."""
    ema_decay: Fraction = 0.99
    """The adapter is the exponential moving average of the trained parameters."""
    ema_warmup: bool = True
    """Start with smaller decays, so that the average forgets the pretrained values soon (DiT's and Minimax's code do not)."""
    classes_per_group: int | None = Field(default=None, ge=1)
    """Fine-tune groups of at most so many classes independently and in parallel, each with its own adapter."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: frozen weights and arithmetic in bfloat16; what is trained, its gradients and optimizer stay float32."""
    compile: bool = False
    """torch.compile each transformer block (all share one compilation); pays off after some minutes of GPU work."""
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations: less memory, a third more work."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: what the workers share among them (1: optimizer state, 2: gradients too, 3: parameters too)."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps after which a restart need not begin again."""
    trainer: TrainerConfig = TrainerConfig()

    @model_validator(mode="after")
    def _possible(self) -> FinetuneConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"set one of steps={self.steps} and epochs={self.epochs}, and the other to null")
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
        """Steps of a fine-tuning on so many images."""
        return self.steps if self.steps is not None else math.ceil((self.epochs or 0) * images / self.batch_size)
