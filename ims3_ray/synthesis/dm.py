"""Distribution matching (DM, Zhao & Bilen 2023, arXiv 2110.04181): synthetic images of a class are changed until their mean
feature equals that of the real images, in networks with random weights.

Every step has a network of its own, which all classes share; its weights, the real images and the augmentation depend on the
seed alone. Classes are therefore independent of each other, and the mean features of real images serve sets of all sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from ims3_ray.component import Section
from ims3_ray.data.augment import padded
from ims3_ray.data.siamese import Family, drawn_families, siamese
from ims3_ray.models.student_costs import forward_flops
from ims3_ray.saving import Save, Saver, unpack_state
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.synthesis.base import Costs, Given, Inputs, Piece, Synthesis
from ims3_ray.synthesis.pixels import (
    FreshNetworks,
    check_network,
    normalised,
    to_bytes,
    without_head,
)

STEPS_PER_PIECE = 500
"""Number of steps whose mean features of real images are one piece of the preparation."""


def matching_loss(real_mean: Tensor, features: Tensor) -> Tensor:
    """``‖real_mean − mean of the features‖²`` for the mean feature of real images [D] and features of synthetic ones [N, D]."""
    return (real_mean - features.mean(dim=0)).square().sum()


class DM(Synthesis):
    """Distribution matching. Images are optimised as normalised values without bounds, and rounded to bytes at the end."""

    name, version = "dm", 2
    starts = frozenset({"set"})
    needs = frozenset({"statistics"})
    preparation_needs = frozenset({"real", "statistics"})
    prepared_by = frozenset({"steps", "batch_size", "network", "width", "pad_to", "dsa"})

    class Config(Section):
        """Distribution matching (DM): the mean feature of a class's images is matched with that of its real images, in a new
        random network every step."""

        steps: int = Field(default=20000, ge=1)
        """Number of steps."""
        lr: float = Field(default=1.0, gt=0)
        """Learning rate of SGD for the images (DM takes 10 for more than 50 images per class of CIFAR-10)."""
        momentum: float = Field(default=0.5, ge=0, lt=1)
        """Momentum of SGD for the images."""
        batch_size: int = Field(default=256, ge=1)
        """Number of real images whose mean feature is matched in a step; all images of a smaller class."""
        network: str = "convnet-3"
        """The network whose features are matched: `convnet-DEPTH` or `resnetap-10`, with instance norm."""
        width: int = Field(default=128, ge=1)
        """Number of channels of every layer of a ConvNet."""
        pad_to: int | None = Field(default=32, ge=8)
        """Height and width to which smaller images are padded with the mean colour before the network (DM pads 28 pixels to
        32); no padding when unset."""
        dsa: tuple[Family, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")
        """Families of DSA's augmentations, of which one is drawn for each step and applied alike to real and synthetic images.
        Digits and other images that must not be mirrored go without `flip`."""

    config: Config

    @classmethod
    def pieces(cls, config: Config, counts: Sequence[int]) -> list[Piece]:
        return [(position, n) for position in range(len(counts)) for n in range(-(-config.steps // STEPS_PER_PIECE))]

    @classmethod
    def flops(cls, config: Config, costs: Costs) -> float:
        """A step of an image takes a forward pass and the gradient with respect to the pixels; that of the weights is not
        computed."""
        return 2.0 * config.steps * costs.k * len(costs.counts) * _features_flops(config, costs)

    @classmethod
    def preparation_flops(cls, config: Config, costs: Costs) -> float:
        images = sum(min(count, config.batch_size) for count in costs.counts)
        return float(config.steps * images) * _features_flops(config, costs)

    @classmethod
    def preparation_bytes(cls, config: Config, costs: Costs) -> float:
        size = max(costs.size, config.pad_to or 0)
        with torch.device("meta"):
            network = FreshNetworks(config.network, config.width, costs.channels, size, len(costs.counts), "meta")(0)
            features = without_head(network)(torch.zeros(1, costs.channels, size, size)).numel()
        return 4.0 * config.steps * len(costs.counts) * features

    @classmethod
    def check(cls, config: Config, costs: Costs) -> None:
        check_network("dm", config.network, config.width, config.pad_to, costs)

    @torch.no_grad()
    def prepare(self, piece: Piece, inputs: Inputs) -> Mapping[str, Tensor]:
        """``means`` float32 [steps of the piece, D]: the mean feature of a batch of real images in each step's network."""
        c, (position, number) = self.config, piece
        assert inputs.statistics is not None
        real = normalised(inputs.real(position), inputs.statistics, inputs.device)
        networks, means = self._networks(inputs), []
        for step in range(number * STEPS_PER_PIECE, min(c.steps, (number + 1) * STEPS_PER_PIECE)):
            drawn = torch.randperm(len(real), generator=generator_for(inputs.seed, "dm-real", position, step))[: c.batch_size]
            batch = real[drawn.to(real.device)]
            means.append(self._features(self._network(networks, inputs, step), batch, inputs, position, step).mean(dim=0))
        return {"means": torch.stack(means)}

    def make(self, given: Given, state: bytes | None, save: Save) -> Mapping[str, Tensor]:
        return {"pixels": to_bytes(self.optimised(given, state, save))}

    def optimised(self, given: Given, state: bytes | None, save: Save) -> Tensor:
        """The images after all steps, float32 [N, C, H, W] where pixels are in [0, 1]; they may lie outside."""
        c, position = self.config, int(given.classes[0])
        assert given.statistics is not None
        first = 0
        images = normalised(given.pixels, given.statistics, given.device)
        velocity = torch.zeros_like(images)
        if state is not None:
            saved = unpack_state(state, given.device)
            first, images, velocity = saved["step"], saved["images"], saved["velocity"]
        networks, saver, means = self._networks(given), Saver(save), Tensor()
        for step in range(first, c.steps):
            if step == first or step % STEPS_PER_PIECE == 0:
                means = given.prepared((position, step // STEPS_PER_PIECE))["means"].to(given.device)
            images.requires_grad_()
            features = self._features(self._network(networks, given, step), images, given, position, step)
            (gradient,) = torch.autograd.grad(matching_loss(means[step % STEPS_PER_PIECE], features), [images])
            velocity = c.momentum * velocity + gradient
            images = images.detach() - c.lr * velocity
            saver((step + 1) / c.steps, step=step + 1, images=images, velocity=velocity)
        mean, std = given.statistics
        return images * std + mean

    def _networks(self, inputs: Inputs) -> FreshNetworks:
        c = self.config
        size = max(inputs.size, c.pad_to or 0)
        return FreshNetworks(c.network, c.width, inputs.channels, size, inputs.num_classes, inputs.device)

    def _network(self, networks: FreshNetworks, inputs: Inputs, step: int) -> nn.Module:
        """The network of a step, without its head and frozen."""
        return without_head(networks(seed_for(inputs.seed, "dm-network", step))).requires_grad_(False)

    def _features(self, network: nn.Module, images: Tensor, inputs: Inputs, position: int, step: int) -> Tensor:
        """Features [N, D] of normalised images after the step's augmentation, which is the same for all images of the class."""
        if self.config.dsa:
            draws: Generator = generator_for(inputs.seed, "dm-augment", position, step)
            images = siamese(images, drawn_families([self.config.dsa], draws), draws, alike=True)
        features: Tensor = network(padded(images, self.config.pad_to))
        return features.flatten(1)


def _features_flops(config: DM.Config, costs: Costs) -> float:
    size = max(costs.size, config.pad_to or 0)
    return forward_flops(config.network, costs.channels, size, len(costs.counts), "instance", config.width)
