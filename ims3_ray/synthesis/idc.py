"""IDC (Kim et al. 2022, arXiv 2205.14959): images are changed until a network's gradients on them equal those on real images.

This is IDC-I, the tables' IDC-1, in which an image of the set is one image to train on; the multi-formation of IDC, which
stores several smaller images in one, is not implemented.

The networks are trained on real images only, so their weights at every step depend on the seed alone. Classes affect each other
through these networks, and through the optimiser of the images: the published code has one SGD with momentum for all images, so
that a class's step also moves the images of all other classes by their momentum. Here each class takes the momentum steps of
the C−1 other classes by itself, which gives the same images. Groups of classes can therefore be made independently of each
other; each group trains the networks again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from ims3_ray.component import Section
from ims3_ray.data.augment import cutmix, padded
from ims3_ray.data.siamese import Family, siamese
from ims3_ray.models.student_costs import forward_flops
from ims3_ray.saving import Save, Saver, unpack_state
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.synthesis.base import Costs, Given, Part, Synthesis
from ims3_ray.synthesis.pixels import FreshNetworks, check_network, to_bytes

Distance = Literal["squared", "l1"]


def gradients(network: nn.Module, images: Tensor, labels: Tensor, create_graph: bool = False) -> list[Tensor]:
    """Gradients of the cross-entropy of images [B, C, H, W] and labels [B] with respect to the weights of the convolutions,
    each of the shape of its weight. Biases, norms and linear layers are left out, as in the published code."""
    weights = [parameter for parameter in network.parameters() if parameter.dim() == 4]
    loss = F.cross_entropy(network(images), labels)
    return list(torch.autograd.grad(loss, weights, create_graph=create_graph))


def gradient_distance(real: Sequence[Tensor], synthetic: Sequence[Tensor], distance: Distance) -> Tensor:
    """Sum over all weights of the squared or absolute differences of two lists of gradients of the same shapes; a scalar."""
    differences = [a.detach() - b for a, b in zip(real, synthetic, strict=True)]
    return torch.stack([each.square().sum() if distance == "squared" else each.abs().sum() for each in differences]).sum()


def momentum_steps(
    images: Tensor, velocity: Tensor, lr: float, momentum: float, steps: int
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``images`` and ``velocity``, both [N, C, H, W], after so many steps of SGD with momentum whose gradients are zero."""
    share = sum(momentum**step for step in range(1, steps + 1))
    return images - lr * share * velocity, velocity * momentum**steps


class IDC(Synthesis):
    """Gradient matching with networks that are trained on real images meanwhile."""

    name, version = "idc", 2
    starts = frozenset({"set"})
    needs = frozenset({"real", "statistics"})

    class Config(Section):
        """IDC-I: the gradients of a network on a class's images are matched with those on its real images, while the network
        learns from real images."""

        outer: int = Field(default=2000, ge=1)
        """Number of networks, each with fresh weights (ImageNet: 500)."""
        inner: int = Field(default=100, ge=1)
        """Number of times that each network is matched for every class and then trained."""
        lr: float = Field(default=5e-3, gt=0)
        """Learning rate of SGD for the images, as values in [0, 1], at 10 images per class and images of `lr_size`. It is
        multiplied by K/10 and by (size / lr_size)². CIFAR-10: 5e-3; Fashion-MNIST: 1e-4 with `distance: l1`; ImageNet-10:
        3e-3."""
        lr_size: int = Field(default=32, ge=1)
        """Size of images to which `lr` refers: 32, or 224 for ImageNet."""
        momentum: float = Field(default=0.5, ge=0, lt=1)
        """Momentum of SGD for the images."""
        distance: Distance = "squared"
        """Distance of gradients: `squared` (CIFAR) or `l1` (Fashion-MNIST, ImageNet)."""
        batch_size: int = Field(default=64, ge=1)
        """Number of real images of a class in a match, and of all classes in a training step of the network."""
        most: int = Field(default=128, ge=1)
        """The most synthetic images of a class in a match; of more, so many are drawn."""
        training_images: int = Field(default=2000, ge=0)
        """Number of real images that a network learns from after each match of all classes (Fashion-MNIST, ImageNet: 500)."""
        pretraining_epochs: int = Field(default=0, ge=0)
        """Number of epochs of the real images by which each network is trained at first (ImageNet-10: 10)."""
        network: str = "convnet-3"
        """The network: `convnet-DEPTH`, or `resnetap-10` for images of 224 pixels, with instance norm."""
        width: int = Field(default=128, ge=1)
        """Number of channels of every layer of a ConvNet."""
        network_lr: float = Field(default=0.01, gt=0)
        """Learning rate of the networks' SGD."""
        network_momentum: float = Field(default=0.9, ge=0, lt=1)
        """Momentum of the networks' SGD."""
        network_weight_decay: float = Field(default=5e-4, ge=0)
        """Weight decay of the networks' SGD."""
        pad_to: int | None = Field(default=32, ge=8)
        """Height and width to which smaller images are padded with the mean colour before the network (IDC pads 28 pixels to
        32); no padding when unset."""
        match_dsa: tuple[Family, ...] = ("color", "crop", "cutout")
        """Families of DSA's augmentations that are all applied, with one draw, to the real and synthetic images of a match."""
        train_dsa: tuple[Family, ...] = ("color", "crop")
        """Families that are all applied to each image from which a network learns."""
        cutmix: float = Field(default=0.5, ge=0, le=1)
        """Probability of CutMix for a batch from which a network learns (ImageNet: 1)."""
        groups: int = Field(default=1, ge=1)
        """Number of groups of classes that are made in parallel. Each trains the networks again and holds all real images on
        its device as bytes (ImageNet-100 at 224 pixels: 20 GB)."""

    config: Config

    @classmethod
    def parts(cls, config: Config, num_classes: int, k: int) -> list[Part]:
        groups = min(config.groups, num_classes)
        borders = [num_classes * number // groups for number in range(groups + 1)]
        return [
            [(position, number) for position in range(first, end) for number in range(k)] for first, end in pairwise(borders)
        ]

    @classmethod
    def flops(cls, config: Config, costs: Costs) -> float:
        """A match takes three forward passes for each real image and nine for each synthetic one, whose gradient is
        differentiated again; training takes three for each image."""
        c, size = config, max(costs.size, config.pad_to or 0)
        forward = forward_flops(c.network, costs.channels, size, len(costs.counts), "instance", c.width)
        match = _match_passes(c, costs.counts, costs.k)
        real = sum(costs.counts)
        trained = c.inner * min(c.training_images, real) + c.pretraining_epochs * real
        return c.outer * forward * (c.inner * match + min(c.groups, len(costs.counts)) * 3 * trained)

    @classmethod
    def check(cls, config: Config, costs: Costs) -> None:
        check_network("idc", config.network, config.width, config.pad_to, costs)

    def make(self, given: Given, state: bytes | None, save: Save) -> Mapping[str, Tensor]:
        return {"pixels": to_bytes(Matching(self.config, given, state, save).run())}


def _match_passes(config: IDC.Config, counts: Sequence[int], k: int) -> int:
    """Forward passes of one image that a match of every class costs, for classes of ``counts`` real and ``k`` synthetic
    images: three for each real image and nine for each synthetic one, whose gradient is differentiated again."""
    return sum(3 * min(count, config.batch_size) + 9 * min(k, config.most) for count in counts)


class Matching:
    """The making of one group of classes."""

    def __init__(self, config: IDC.Config, given: Given, state: bytes | None, save: Save) -> None:
        self.config, self.given, self.saver = config, given, Saver(save)
        self.positions = given.classes.unique().tolist()
        self.members = {position: (given.classes == position).nonzero().flatten() for position in self.positions}
        self.k = max(len(members) for members in self.members.values())
        self.lr = config.lr * self.k / 10 * (given.size / config.lr_size) ** 2
        self.images = given.pixels.to(given.device).float() / 255
        self.velocity = torch.zeros_like(self.images)
        real = [given.real(position) for position in range(given.num_classes)]
        counts = [len(each) for each in real]
        self.pixels = torch.cat(real).to(given.device)
        self.labels = torch.arange(given.num_classes).repeat_interleave(torch.tensor(counts)).to(given.device)
        self.real = self.pixels.split(counts)
        self.saved = unpack_state(state, given.device) if state is not None else None
        size = max(given.size, config.pad_to or 0)
        self.networks = FreshNetworks(config.network, config.width, given.channels, size, given.num_classes, given.device)

    def run(self) -> Tensor:
        """All steps; returns the images [N, C, H, W] as values that may lie outside of [0, 1]."""
        c, saved, first = self.config, self.saved, 0
        self.saved = None
        if saved is not None:
            first, self.images, self.velocity = (saved[name] for name in ("outer", "images", "velocity"))
        for outer in range(first, c.outer):
            network = self.networks(seed_for(self.given.seed, "idc-network", outer))
            optimizer = torch.optim.SGD(
                network.parameters(), lr=c.network_lr, momentum=c.network_momentum, weight_decay=c.network_weight_decay
            )
            pretrained, begin = 0, 0
            if saved is not None:
                pretrained, begin = saved["pretrained"], saved["inner"]
                network.load_state_dict(saved["network"])
                optimizer.load_state_dict(saved["optimizer"])
                saved = None
            else:
                self.images = self.images.clamp(0, 1)  # the published code clamps here and nowhere else
            for epoch in range(pretrained, c.pretraining_epochs):
                self.train(network, optimizer, len(self.pixels), ("idc-pretrain", outer, epoch))
                self._save(network, optimizer, outer, epoch + 1, 0)
            for inner in range(begin, c.inner):
                for position in self.positions:
                    self.match(network, position, outer, inner)
                if c.training_images:
                    self.train(network, optimizer, c.training_images, ("idc-train", outer, inner))
                self._save(network, optimizer, outer, c.pretraining_epochs, inner + 1)
        return self.images

    def _save(self, network: nn.Module, optimizer: torch.optim.Optimizer, outer: int, pretrained: int, inner: int) -> None:
        c, real = self.config, len(self.pixels)
        match = _match_passes(c, [len(self.real[position]) for position in self.positions], self.k)
        before, each = 3 * real * c.pretraining_epochs, match + 3 * min(c.training_images, real)
        share = (3 * real * pretrained + each * inner) / (before + each * c.inner)
        self.saver(
            (outer + share) / c.outer,
            outer=outer, pretrained=pretrained, inner=inner, images=self.images, velocity=self.velocity,
            network=network.state_dict(), optimizer=optimizer.state_dict(),
        )  # fmt: skip

    def match(self, network: nn.Module, position: int, outer: int, inner: int) -> None:
        """Change the images of one class by a step of SGD, and by the momentum steps of the other classes' turns."""
        c, seed, device = self.config, self.given.seed, self.given.device
        real, members = self.real[position], self.members[position]
        self._move_on(members, position)
        rng = generator_for(seed, "idc-match", outer, inner, position)
        drawn = torch.randperm(len(real), generator=rng)[: c.batch_size]
        chosen = members[torch.randperm(len(members), generator=rng)[: c.most].sort().values]
        synthetic = self.images[chosen].requires_grad_()
        both = self._seen(torch.cat([real[drawn.to(device)].float() / 255, synthetic]), c.match_dsa, rng, alike=True)
        labels = torch.full((len(both),), position, device=device)
        count = len(drawn)
        wanted = gradients(network, both[:count].detach(), labels[:count])
        found = gradients(network, both[count:], labels[count:], create_graph=True)
        (gradient,) = torch.autograd.grad(gradient_distance(wanted, found, c.distance), [synthetic])
        self.velocity[members] *= c.momentum
        self.velocity[chosen] += gradient
        self.images[members] -= self.lr * self.velocity[members]
        self._move_on(members, self.given.num_classes - 1 - position)

    def _move_on(self, members: Tensor, steps: int) -> None:
        """Take so many momentum steps with a class's images, whose positions in the part are ``members`` [K]."""
        moved = momentum_steps(self.images[members], self.velocity[members], self.lr, self.config.momentum, steps)
        self.images[members], self.velocity[members] = moved

    def train(self, network: nn.Module, optimizer: torch.optim.Optimizer, images: int, address: tuple[str, int, int]) -> None:
        """Train a network on random real images of all classes, in batches."""
        c = self.config
        rng = generator_for(self.given.seed, *address)
        for index in torch.randperm(len(self.pixels), generator=rng)[:images].to(self.pixels.device).split(c.batch_size):
            batch, labels = self._seen(self.pixels[index].float() / 255, c.train_dsa, rng), self.labels[index]
            order_of, share = None, 1.0
            if c.cutmix and torch.rand((), generator=rng).item() < c.cutmix:
                batch, order_of, share = cutmix(batch, rng)
            logits = network(batch)
            loss = share * F.cross_entropy(logits, labels)
            if order_of is not None:
                loss = loss + (1 - share) * F.cross_entropy(logits, labels[order_of])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    def _seen(self, images: Tensor, families: Sequence[Family], rng: Generator, alike: bool = False) -> Tensor:
        """Images in [0, 1] as the network gets them: normalised, augmented, padded."""
        assert self.given.statistics is not None
        mean, std = self.given.statistics
        return padded(siamese((images - mean) / std, families, rng, alike=alike), self.config.pad_to)
