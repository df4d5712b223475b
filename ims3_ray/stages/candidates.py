"""Sampling of a unit of candidates, as an actor of the pool does it. It needs no Ray."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.config import SamplingConfig
from ims3_ray.data.transforms import to_uint8
from ims3_ray.diffusion.samplers.base import Sampler, sample
from ims3_ray.diffusion.steering.base import Steering
from ims3_ray.engine.images import DTYPES, Decoder, Produced
from ims3_ray.engine.shards import parse_unit
from ims3_ray.engine.weights import Weights
from ims3_ray.io.artifacts import Artifact
from ims3_ray.models.generators.base import Generator
from ims3_ray.seeds import generator_for
from ims3_ray.stages.adapters import Adapters, GroupModels, Pretrained
from ims3_ray.training.precision import precision_on


@dataclass(frozen=True)
class Steered:
    """What an actor needs to build the steering of a pool."""

    steering: type[Steering]
    config: Any
    k: int
    seed: int
    steps: int
    artifact: Artifact
    """Artifact of the stage that has processed the real images."""
    units: Mapping[int, Sequence[str]]
    """Label of a class → the units of the class in that artifact."""

    def build(self, device: str) -> Steering:
        return self.steering(self.config, self.k, self.seed, self.steps, self.shards, device)

    def shards(self, label: int) -> list[dict[str, Tensor]]:
        """Tensors of each unit of a class."""
        return [load(self.artifact.read(f"{unit}.safetensors")) for unit in self.units[label]]


class Candidates:
    """Samples from the generator. Image ``index`` of a class starts from noise seeded by (run seed, class, index) alone.

    A unit is one batch, whose samples have the same class and timestep and share their embeddings; samples that are told
    captions are as many batches as there are lengths of captions. A batch that does not fit into memory is halved, for this
    unit and all later ones; the images then stay the same except for rounding.
    """

    def __init__(
        self, sampling: SamplingConfig, pretrained: Pretrained, adapters: Adapters | None, autoencoder: Path | None, seed: int,
        device: str, steering: Steering | None = None, size: int | None = None,
    ) -> None:  # fmt: skip
        """``size`` is the height and width to which the images of an autoencoder are scaled, if they have another."""
        self.sampling, self.seed, self.device, self.batch = sampling, seed, device, sampling.unit_size
        precision = precision_on(sampling.precision, torch.device(device).type)
        self.models = GroupModels(pretrained, adapters, device, DTYPES[precision], sampling.compile)
        self.decoder = Decoder(autoencoder, device, precision, size) if autoencoder is not None else None
        self.sampler, self.steering = Sampler.registry[sampling.sampler], steering

    def __call__(self, unit: str) -> Produced:
        label, number = parse_unit(unit)
        size, step = self.sampling.unit_size, self.batch  # the batch size may be halved meanwhile
        indices = range(number * size, (number + 1) * size)
        signed = torch.cat([self._draw(label, indices[start : start + step]) for start in range(0, size, step)])
        names = [f"c{label:04d}/{index:06d}" for index in indices]
        batch = self.batch if self.batch < size else None
        if self.decoder is None:
            return Produced(to_uint8(signed), names, batch=batch)
        latents = signed.half()  # rounded before decoding, so that decoding the stored latents gives the same pixels
        return Produced(self.decoder(latents), names, latents=latents.cpu(), batch=batch)

    @torch.inference_mode()
    def _draw(self, label: int, indices: Sequence[int]) -> Tensor:
        """The samples of a class at ``indices``, float32 on the device."""
        words = self.steering.words(label, indices) if self.steering is not None else None
        lengths = [self.models.generator.condition(label, each).shape[1:] for each in words or ()]
        if words is None or len(set(lengths)) == 1:
            return self._batch(label, indices, words)
        found: dict[int, Tensor] = {}  # conditions of one batch have one shape, and padding would change the samples
        for length in dict.fromkeys(lengths):
            mine = [position for position, each in enumerate(lengths) if each == length]
            part = self._batch(label, [indices[position] for position in mine], [words[position] for position in mine])
            found.update(zip(mine, part, strict=True))
        return torch.stack([found[position] for position in range(len(indices))])

    def _batch(self, label: int, indices: Sequence[int], words: Sequence[str] | None) -> Tensor:
        s, generator, count = self.sampling, self.models.generator, 1 if words is None else len(indices)
        predict = self.models.predictor(
            label, count, s.cfg_scale, s.cfg_channels, cfg_interval=s.cfg_interval,
            variance=generator.learns_variance and self.sampler.uses_variance, words=words,
        )  # fmt: skip
        rngs = [generator_for(self.seed, "image", label, index) for index in indices]
        options = self.steering.options(label, indices) if self.steering is not None else {}
        try:
            return sample(
                predict, generator.latent, rngs, generator.schedule, s.steps, sampler=self.sampler(s.of(self.sampler)),
                clip=s.clip, device=self.device, **options,
            )  # fmt: skip
        except torch.OutOfMemoryError:
            if len(indices) == 1:
                raise
        torch.cuda.empty_cache()
        half = -(-len(indices) // 2)
        self.batch = min(self.batch, half)
        return torch.cat([self._draw(label, part) for part in (indices[:half], indices[half:])])


def candidates_of(
    sampling: SamplingConfig, pretrained: Pretrained, autoencoder: Weights | None, adapters: Adapters | None, seed: int,
    steered: Steered | None = None, size: int | None = None,
) -> Callable[[str], Candidates]:  # fmt: skip
    """A function that an actor calls with its device to build :class:`Candidates`; ``autoencoder`` is that of latents."""
    return partial(_candidates, sampling, pretrained, autoencoder, adapters, seed, steered, size)


def _candidates(
    sampling: SamplingConfig, pretrained: Pretrained, autoencoder: Weights | None, adapters: Adapters | None, seed: int,
    steered: Steered | None, size: int | None, device: str,
) -> Candidates:  # fmt: skip
    decoder = autoencoder.path() if autoencoder is not None else None
    steering = steered.build(device) if steered is not None else None
    return Candidates(sampling, pretrained, adapters, decoder, seed, device, steering, size)


def sampling_flops(generator: Generator, sampling: SamplingConfig) -> float:
    """Floating-point operations of sampling one image. In each step the sampler makes its calls, each of one forward pass, or
    of two where guidance is active."""
    low, high = sampling.cfg_interval
    share = sampling.steering.share(sampling.of(sampling.steering)) if sampling.steering is not None else 1.0
    sampler = Sampler.registry[sampling.sampler]
    calls = share * sampling.steps * sampler.calls + sampler.more_calls
    return calls * (1 + (high - low if sampling.cfg_scale > 1 else 0)) * generator.forward_flops()
