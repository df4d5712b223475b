"""What an actor of the pool makes a unit's images with: decoded from a source, drawn from the generator, or read again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ims3_ray.config import DataConfig, SamplingConfig
from ims3_ray.data.sources import open_source
from ims3_ray.data.transforms import to_pixels, to_uint8
from ims3_ray.diffusion.sampling import guided, sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.seeds import generator_for
from ims3_ray.stages.adapters import Adapters, GroupModels
from ims3_ray.stages.base import Context, Stage, parse_unit
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


class Candidates:
    """Samples the generator. Image ``index`` of a class starts from noise seeded by (run seed, class, index) alone.

    A unit is one batch with one class and one timestep, whose embeddings its samples share. Where memory does not suffice, the
    batch is halved, for this unit and those that follow: the images stay the same but for their last bits.
    """

    def __init__(
        self, sampling: SamplingConfig, weights: Path, adapters: Adapters | None, autoencoder: Path | None, seed: int,
        device: str,
    ) -> None:  # fmt: skip
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
            return sample(predict, latent, rngs, self.schedule, s.steps, sampler=s.sampler, clip=s.clip, device=self.device)
        except torch.OutOfMemoryError:
            if len(indices) == 1:
                raise
        torch.cuda.empty_cache()
        half = -(-len(indices) // 2)
        self.batch = min(self.batch, half)
        return torch.cat([self._draw(label, part) for part in (indices[:half], indices[half:])])


class Stored:
    """Reads units that were produced before, so that another φ or an autoencoder can look at them."""

    def __init__(self, store: ImageStore, device: str) -> None:
        self.store, self.decoder = store, store.decoder(device)

    def __call__(self, unit: str) -> Produced:
        pixels = self.store.read(unit, self.decoder)
        return Produced(pixels, [f"image {offset} of unit {unit}" for offset in range(len(pixels))])


def producer_of(context: Context, stage: Stage) -> Callable[[str], Producer]:
    """What an actor builds for itself when it starts, on its device, to make the images of ``stage``."""
    config = context.config
    if stage.kind == "encode":
        return partial(_real, config.data, stage.places["path"], stage.places["split"])
    adapters = Adapters.of(stage.inputs["finetune"], context.storage) if "finetune" in stage.inputs else None
    return candidates_of(config.sampling, stage.weights, adapters, config.seed)


def candidates_of(
    sampling: SamplingConfig, weights: Mapping[str, Weights], adapters: Adapters | None, seed: int
) -> Callable[[str], Candidates]:
    """The same for candidates, of weights ``generator`` and, for latents, ``autoencoder``."""
    return partial(_candidates, sampling, weights, adapters, seed)


def _real(data: DataConfig, path: str, split: str, device: str) -> RealImages:
    return RealImages(data, path, split)


def _candidates(
    sampling: SamplingConfig, weights: Mapping[str, Weights], adapters: Adapters | None, seed: int, device: str
) -> Candidates:
    autoencoder = weights["autoencoder"].path() if "autoencoder" in weights else None
    return Candidates(sampling, weights["generator"].path(), adapters, autoencoder, seed, device)
