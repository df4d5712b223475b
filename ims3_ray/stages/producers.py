"""What an actor of the pool makes a unit's images with: decoded from a source, drawn from the generator, or read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from ims3_ray.artifacts import Artifact
from ims3_ray.config import DataConfig, SamplingConfig
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_pixels, to_uint8
from ims3_ray.diffusion.inverted_gaussian import Gaussian, draw_group, start_index
from ims3_ray.diffusion.mode_guidance import toward_modes
from ims3_ray.diffusion.sampling import guided, sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.seeds import generator_for
from ims3_ray.stages.adapters import Adapters, GroupModels
from ims3_ray.stages.base import Context, Stage, by_class, parse_unit, read_class
from ims3_ray.stages.images import DTYPES, Decoder, ImageStore, Produced
from ims3_ray.stages.weights import Weights

Producer = Callable[[str], Produced]


class RealImages:
    """Decodes a data source. Unit u of a class is its images u·unit_size … in the source's order."""

    def __init__(self, data: DataConfig, path: str, split: str) -> None:
        self.data, self.source = data, open_source(path, split)

    def __call__(self, unit: str) -> Produced:
        label, number = parse_unit(unit)
        size = self.data.unit_size
        indices = np.flatnonzero(self.source.labels == label)[number * size : (number + 1) * size]
        pixels, names, broken = [], [], []
        for index in indices.tolist():
            try:
                pixels.append(to_pixels(self.source.image(index), self.data.size, self.data.channels))
                names.append(self.source.identify(index))
            except OSError as error:
                broken.append(f"{self.source.identify(index)}: {str(error).splitlines()[0]}")
        empty = np.zeros((0, self.data.channels, self.data.size, self.data.size), np.uint8)
        return Produced(torch.from_numpy(np.stack(pixels) if pixels else empty), names, broken)


@dataclass(frozen=True)
class Guides:
    """What of the real images leads the sampling, beside the generator: modes, or sums over inverted images, by class."""

    k: int
    """K, images of a set: candidate i goes to mode i mod K; starts are drawn K at a time."""
    modes: Artifact | None = None
    inverted: Artifact | None = None
    units: Mapping[int, list[str]] = field(default_factory=dict)
    """Label → units of ``inverted``, or the one of ``modes``."""

    def modes_of(self, label: int) -> Tensor:
        """[K, C, H, W]"""
        assert self.modes is not None
        return read_class(self.modes, self.units[label], "modes")

    def gaussian_of(self, label: int) -> Gaussian:
        assert self.inverted is not None
        shards = [load(self.inverted.read(f"{unit}.safetensors")) for unit in self.units[label]]
        total, squares, count = (sum(shard[name] for shard in shards) for name in ("total", "squares", "count"))
        return Gaussian.of(total, squares, int(count))  # type: ignore[arg-type]


HELD = 64
"""Groups of starts, or classes' modes, that are kept for the next unit."""


class Candidates:
    """Samples the generator. Image ``index`` of a class starts from noise seeded by (run seed, class, index) alone.

    A unit is one batch with one class and one timestep, whose embeddings its samples share. Where memory does not suffice, the
    batch is halved, for this unit and those that follow: the images stay the same but for their last bits.
    """

    def __init__(
        self, sampling: SamplingConfig, weights: Path, adapters: Adapters | None, autoencoder: Path | None, seed: int,
        device: str, guides: Guides | None = None,
    ) -> None:  # fmt: skip
        self.guides, self.held = guides, lru_cache(HELD)(self._held)
        self.sampling, self.seed, self.device, self.batch = sampling, seed, device, sampling.unit_size
        self.models = GroupModels(weights, adapters, device, DTYPES[sampling.precision], sampling.compile)
        self.decoder = Decoder(autoencoder, device, sampling.precision) if autoencoder is not None else None
        self.schedule = NoiseSchedule()

    def __call__(self, unit: str) -> Produced:
        label, number = parse_unit(unit)
        size, step = self.sampling.unit_size, self.batch  # which may be halved on the way
        indices = range(number * size, (number + 1) * size)
        signed = torch.cat([self._draw(label, indices[start : start + step]) for start in range(0, size, step)])
        names = [f"c{label:04d}/{index:06d}" for index in indices]
        batch = self.batch if self.batch < size else None
        if self.decoder is None:
            return Produced(to_uint8(signed), names, batch=batch)
        latents = signed.half()  # rounded before they are decoded, so that decoding them again gives the same
        return Produced(self.decoder(latents), names, latents=latents.cpu(), batch=batch)

    @torch.inference_mode()
    def _draw(self, label: int, indices: Sequence[int]) -> Tensor:
        """The samples of a class at ``indices``, float32 on the device."""
        s, model = self.sampling, self.models.of_class(label)
        shape = model.config
        predict = guided(
            model, torch.tensor([label], device=self.device), shape.null_label, s.cfg_scale, s.cfg_channels,
            cfg_interval=s.cfg_interval, variance=shape.learn_sigma and s.sampler == "ddpm",
        )  # fmt: skip
        rngs = [generator_for(self.seed, "image", label, index) for index in indices]
        latent = (shape.in_channels, shape.input_size, shape.input_size)
        try:
            return sample(
                predict, latent, rngs, self.schedule, s.steps, sampler=s.sampler, clip=s.clip, device=self.device,
                **self._led(label, indices),
            )  # fmt: skip
        except torch.OutOfMemoryError:
            if len(indices) == 1:
                raise
        torch.cuda.empty_cache()
        half = -(-len(indices) // 2)
        self.batch = min(self.batch, half)
        return torch.cat([self._draw(label, part) for part in (indices[:half], indices[half:])])

    def _led(self, label: int, indices: Sequence[int]) -> dict[str, Any]:
        """What leads these samples (MGD3, D3HR), as options of :func:`sample`."""
        s, guides = self.sampling, self.guides
        if guides is None:
            return {}
        if guides.modes is not None:
            modes = self.held(label, 0)[[index % guides.k for index in indices]].to(self.device)
            return {"drift": toward_modes(modes, s.mode_guidance.strength, s.mode_guidance.until)}
        starts = torch.stack([self.held(label, index // guides.k)[index % guides.k] for index in indices])
        return {"start": starts, "first": start_index(s.steps, s.inverted_gaussian.until)}

    def _held(self, label: int, group: int) -> Tensor:
        """A class's modes, or the starts of one group of K of its candidates."""
        assert self.guides is not None
        if self.guides.modes is not None:
            return self.guides.modes_of(label)
        g, rng = self.sampling.inverted_gaussian, generator_for(self.seed, "starts", label, group)
        return draw_group(self.guides.gaussian_of(label), self.guides.k, g.groups, g.skewness, rng, self.device)


class Stored:
    """Reads units that were produced before, so that another φ or an autoencoder can look at them."""

    def __init__(self, store: ImageStore, device: str) -> None:
        self.store, self.decoder = store, store.decoder(device)

    def __call__(self, unit: str) -> Produced:
        pixels = self.store.read(unit, self.decoder)
        return Produced(pixels, [f"image {offset} of unit {unit}" for offset in range(len(pixels))])


def producer_of(context: Context, stage: Stage) -> Callable[[str], Producer]:
    """What an actor builds for itself when it starts, on its device, to make the images of ``stage``."""
    if stage.kind == "encode":
        return partial(_real, context.config.data, stage.places["path"], stage.places["split"])
    adapters = Adapters.of(stage.inputs["finetune"], context.storage) if "finetune" in stage.inputs else None
    return partial(_candidates, stage.run.sampling, stage.weights, adapters, stage.run.seed, _guides(context, stage))


def _guides(context: Context, stage: Stage) -> Guides | None:
    k, labels, storage = stage.run.selection.images_per_class, context.classes.generator_labels, context.storage
    if modes := stage.inputs.get("modes"):
        return Guides(k, modes=modes.artifact(storage), units=dict(zip(labels, ([u] for u in modes.units), strict=True)))
    if inverted := stage.inputs.get("inverted"):
        units = by_class(inverted.units)
        own = {label: units[source] for label, source in zip(labels, context.classes.source_labels, strict=True)}
        return Guides(k, inverted=inverted.artifact(storage), units=own)
    return None


def candidates_of(
    sampling: SamplingConfig, weights: Mapping[str, Weights], adapters: Adapters | None, seed: int
) -> Callable[[str], Candidates]:
    """The same for candidates, of weights ``generator`` and, for latents, ``autoencoder``."""
    return partial(_candidates, sampling, weights, adapters, seed, None)


def _real(data: DataConfig, path: str, split: str, device: str) -> RealImages:
    return RealImages(data, path, split)


def _candidates(
    sampling: SamplingConfig, weights: Mapping[str, Weights], adapters: Adapters | None, seed: int, guides: Guides | None,
    device: str,
) -> Candidates:  # fmt: skip
    autoencoder = weights["autoencoder"].path() if "autoencoder" in weights else None
    return Candidates(sampling, weights["generator"].path(), adapters, autoencoder, seed, device, guides)
