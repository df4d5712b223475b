"""SRe2L (Yin et al. 2023, arXiv 2306.13092): images are recovered from noise by a teacher and its batch norms' statistics.

Images of one number and up to 100 classes are optimised together, because the batch statistics of the teacher's layers are
taken over them. CDA (Yin & Shen 2024) is the same with crops that become smaller during the optimisation: ``crop_decay``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import Field, model_validator
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ims3_ray.component import Section
from ims3_ray.data.augment import crop_boxes, cropped
from ims3_ray.errors import UserError
from ims3_ray.models.encoder import uses_batch_norm
from ims3_ray.models.teacher import TeacherNetwork
from ims3_ray.saving import Save, Saver, unpack_state
from ims3_ray.seeds import generator_for
from ims3_ray.synthesis.base import Costs, Given, Part, Synthesis
from ims3_ray.synthesis.pixels import as_jpeg, to_bytes

FIRST_LAYER_WEIGHT = 10.0
"""Weight of the first batch norm in the loss; that of the others is 1."""
SMALLEST_CROP = 0.08
"""Smallest share of an image's area in a crop."""


class BatchNormDistance:
    """Sum over a network's batch norms of ``‖var − running var‖₂ + ‖mean − running mean‖₂``, for the inputs of the last forward
    pass, with the weight :data:`FIRST_LAYER_WEIGHT` for the first layer. Variances are biased."""

    def __init__(self, network: nn.Module) -> None:
        self.terms: list[Tensor] = []
        norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.hooks = [norm.register_forward_pre_hook(self._look) for norm in norms]

    def _look(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        dims = [dim for dim in range(x.dim()) if dim != 1]
        mean, var = x.mean(dim=dims), x.var(dim=dims, correction=0)
        self.terms.append((var - norm.get_buffer("running_var")).norm() + (mean - norm.get_buffer("running_mean")).norm())

    def take(self) -> Tensor:
        """The sum for the last forward pass."""
        terms, self.terms = self.terms, []
        return FIRST_LAYER_WEIGHT * terms[0] + torch.stack(terms[1:]).sum() if len(terms) > 1 else FIRST_LAYER_WEIGHT * terms[0]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def augmented(images: Tensor, rng: Generator, smallest: float | None, max_roll: int) -> Tensor:
    """Images [B, C, H, W] after one random crop and mirroring for the whole batch, and one roll along both axes. Without a
    ``smallest`` share of the area there is only the roll. ``rng`` is a generator on the CPU."""
    size = images.shape[-1]
    if smallest is not None:
        box = crop_boxes(1, size, size, (smallest, 1.0), rng)
        images = cropped(images, box.expand(len(images), -1).to(images.device), size)
        if torch.rand((), generator=rng) < 0.5:
            images = images.flip(3)
    down, right = (int(roll) for roll in torch.randint(max_roll + 1, (2,), generator=rng))
    return images.roll((down, right), dims=(2, 3))


class SRe2L(Synthesis):
    """Recovers images from noise, or starts from those of a set."""

    name = "sre2l"
    needs = frozenset({"teacher"})

    class Config(Section):
        """SRe2L: images that a teacher with batch norm assigns to their class and whose features have the statistics of real
        images."""

        steps: int = Field(default=4000, ge=1)
        """Number of steps of Adam (CIFAR-100: 1000)."""
        lr: float = Field(default=0.25, gt=0)
        """Learning rate of Adam, with cosine decay to 0 (Tiny-ImageNet: 0.1)."""
        bn_weight: float = Field(default=0.01, ge=0)
        """Weight of the distance between batch statistics and running statistics (Tiny-ImageNet: 1)."""
        crop: bool = True
        """Whether every step takes a random crop and mirroring, the same for the whole batch (CIFAR-100: no)."""
        crop_decay: bool = False
        """Whether the smallest share of the area in a crop falls from 1 to 0.08 by a cosine over the steps (CDA), instead of
        being 0.08 throughout."""
        max_roll: int = Field(default=32, ge=0)
        """Largest number of pixels by which a step rolls the images along each axis (CIFAR: 4)."""
        batch_size: int = Field(default=100, ge=1)
        """Number of classes whose images are optimised together, one image of each."""
        jpeg: int | None = Field(default=75, ge=1, le=100)
        """Quality of the JPEG compression that the published sets have; no compression when unset."""

        @model_validator(mode="after")
        def _crops(self) -> SRe2L.Config:
            if self.crop_decay and not self.crop:
                raise ValueError("crop_decay=true has no effect with crop=false; set crop=true, or leave crop_decay out")
            return self

    config: Config

    @classmethod
    def parts(cls, config: Config, num_classes: int, k: int) -> list[Part]:
        starts = range(0, num_classes, config.batch_size)
        return [
            [(position, number) for position in range(start, min(start + config.batch_size, num_classes))]
            for number in range(k)
            for start in starts
        ]

    @classmethod
    def flops(cls, config: Config, costs: Costs) -> float:
        """A step of an image takes a forward pass and the gradient with respect to the pixels."""
        return 2.0 * config.steps * costs.k * len(costs.counts) * costs.forward["teacher"]

    @classmethod
    def check(cls, config: Config, costs: Costs) -> None:
        assert costs.teacher is not None
        if not uses_batch_norm(costs.teacher.model_dump_json()):
            raise UserError(
                f"synthesis.sre2l needs a teacher with batch norm, such as a ResNet, and {costs.teacher.model} has none; name "
                "another by evaluation.teacher.weights or evaluation.teacher.training.model"
            )

    def make(self, given: Given, state: bytes | None, save: Save) -> Mapping[str, Tensor]:
        c, teacher = self.config, given.teacher
        assert teacher is not None
        images, optimizer, first = self._start(given, teacher, state)
        distance, saver = BatchNormDistance(teacher.encoder.network), Saver(save)
        labels = given.classes.to(given.device)
        low, high = ((value - teacher.mean) / teacher.std for value in (0.0, 1.0))
        # All images of a part see the same crops, so the draws belong to the part's first image.
        address = (int(given.classes[0]), int(given.indices[0]))
        for step in range(first, c.steps):
            rng = generator_for(given.seed, "sre2l", *address, step)
            optimizer.param_groups[0]["lr"] = c.lr * 0.5 * (1 + math.cos(math.pi * step / c.steps))
            seen = augmented(images, rng, self._smallest(step), min(c.max_roll, given.size - 1))
            scores = teacher(seen * teacher.std + teacher.mean)
            loss = F.cross_entropy(scores, labels) + c.bn_weight * distance.take()
            (images.grad,) = torch.autograd.grad(loss, [images])
            optimizer.step()
            with torch.no_grad():
                images.copy_(images.clamp(low, high))
            saver((step + 1) / c.steps, step=step + 1, images=images.detach(), adam=optimizer.state_dict())
        distance.remove()
        pixels = to_bytes(images * teacher.std + teacher.mean)
        return {"pixels": pixels if c.jpeg is None else as_jpeg(pixels, c.jpeg)}

    def _start(self, given: Given, teacher: TeacherNetwork, state: bytes | None) -> tuple[Tensor, torch.optim.Adam, int]:
        """The images, normalised for the teacher, their optimiser, and the step to continue from."""
        first, saved = 0, unpack_state(state, given.device) if state is not None else None
        if saved is not None:
            first, images = saved["step"], saved["images"]
        elif len(given.pixels):
            images = (given.pixels.to(given.device).float() / 255 - teacher.mean) / teacher.std
        else:
            shape = (given.channels, given.size, given.size)
            pairs = zip(given.classes.tolist(), given.indices.tolist(), strict=True)
            noise = [torch.randn(shape, generator=generator_for(given.seed, "sre2l-start", *pair)) for pair in pairs]
            images = torch.stack(noise).to(given.device)
        images = images.clone().requires_grad_()
        optimizer = torch.optim.Adam([images], lr=self.config.lr, betas=(0.5, 0.9), eps=1e-8)
        if saved is not None:
            optimizer.load_state_dict(saved["adam"])
        return images, optimizer, first

    def _smallest(self, step: int) -> float | None:
        """Smallest share of the area in a step's crop; None for no crop."""
        c = self.config
        if not c.crop:
            return None
        if not c.crop_decay:
            return SMALLEST_CROP
        return SMALLEST_CROP + (1 - SMALLEST_CROP) * 0.5 * (1 + math.cos(math.pi * step / c.steps))
