"""Sums over real images that the generator has inverted to the timestep where sampling starts (D3HR)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ims3_ray import plugins
from ims3_ray.config import RunConfig
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.schedule import spacing_version
from ims3_ray.diffusion.steering.inverted_gaussian import InvertedGaussian, invert_to_start
from ims3_ray.engine.images import Derive, Derived, Produced, batches
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.pool import DerivedStage
from ims3_ray.engine.shards import by_class, pack_tensors, parse_unit
from ims3_ray.engine.weights import Weights
from ims3_ray.io.storage import Storage
from ims3_ray.models.autoencoder import AT_ONCE, encoding_flops, load_autoencoder
from ims3_ray.stages.adapters import Pretrained
from ims3_ray.stages.adopt import adopted_classes
from ims3_ray.stages.candidates import sampling_flops
from ims3_ray.stages.encode import Encode


@dataclass(eq=False)
class Invert(DerivedStage):
    """Inverts real images: one shard per unit of images, made by :class:`Inverted`."""

    name = "inverted"

    @classmethod
    def plan(cls, planner: Planner, config: RunConfig) -> Invert:
        """Plan the inversion of ``sampling.inverted_gaussian.images_per_class`` images of each class, in whole units, or of
        all images if that is None."""
        models, s, images = planner.models(config), config.sampling, Encode.plan(planner, "train", config.data)
        start, generator = s.of(InvertedGaussian), models.by_label("sampling.inverted_gaussian (D3HR)")
        params: dict[str, Any] = {
            "generator": models.generator_weights.digest, "steps": s.steps, "until": start.until, "cfg_scale": s.cfg_scale,
            "cfg_channels": s.cfg_channels, "cfg_interval": s.cfg_interval, "precision": s.precision,
            "labels": dict(zip(map(str, images.labels), models.labels, strict=True)),
        }  # fmt: skip
        params |= {**plugins.hashes(type(generator)), **spacing_version(s.steps, "leading")}
        weights, each = {"generator": models.generator_weights}, sampling_flops(generator, s)
        if models.autoencoder is not None and models.autoencoder_weights is not None:
            params |= {"autoencoder": models.autoencoder_weights.digest, **models.autoencoder.version}
            weights["autoencoder"] = models.autoencoder_weights
            each += encoding_flops(models.autoencoder, config.data.size)
        units = by_class(images.units)
        if limit := start.images_per_class:
            params["kept"] = -(-limit // config.data.unit_size)
            units = {label: names[: params["kept"]] for label, names in units.items()}
        kept = tuple(unit for names in units.values() for unit in names)
        count = images.images * len(kept) // len(images.units)
        return planner.add(
            cls(
                "invert train images", params, {"images": images, **adopted_classes(planner, config)}, units=kept, images=count,
                flops=count * each, weights=weights,
            )
        )  # fmt: skip

    def derive(self, storage: Storage) -> Callable[[str], Derive]:
        return partial(_inverted, Pretrained.of(self, storage), self.weights, self.params)


class Inverted:
    """Inverts a unit's real images to the timestep where sampling starts (D3HR) and adds up the results, as safetensors:
    ``total`` (sum) and ``squares`` (sum of squares) float64 [C, h, w], and the number of images ``count`` int64."""

    batch = 50

    def __init__(
        self, pretrained: Pretrained, weights: Mapping[str, Weights], device: str, params: Mapping[str, Any]
    ) -> None:  # fmt: skip
        self.params, self.device = params, device
        dtype = torch.bfloat16 if params["precision"] == "bf16" else torch.float32
        self.generator = pretrained.open()
        self.network = pretrained.load(self.generator).to(device, dtype)
        self.autoencoder = load_autoencoder(weights["autoencoder"].path()).to(device) if "autoencoder" in weights else None

    @torch.inference_mode()
    def __call__(self, unit: str, produced: Produced) -> Derived:
        label = int(self.params["labels"][str(parse_unit(unit)[0])])
        total, squares = (torch.zeros(self.generator.latent, dtype=torch.float64) for _ in range(2))
        for part in batches(produced.pixels, self.batch, self.device):
            z = self._invert(to_signed(part), label).double().cpu()
            total, squares = total + z.sum(dim=0), squares + z.square().sum(dim=0)
        count = torch.tensor(len(produced.pixels))
        return Derived("safetensors", pack_tensors(total=total, squares=squares, count=count))

    def _invert(self, signed: Tensor, label: int) -> Tensor:
        """Invert images in [−1, 1]. A batch that does not fit into memory is halved: images are inverted independently."""
        p = self.params
        try:
            z0 = signed
            if self.autoencoder is not None:
                z0 = torch.cat([self.autoencoder.moments(part)[0] for part in signed.split(AT_ONCE)])
            predict = self.generator.predictor(
                self.network, label, len(z0), p["cfg_scale"], p["cfg_channels"], cfg_interval=tuple(p["cfg_interval"])
            )
            return invert_to_start(predict, z0, self.generator.schedule, p["steps"], p["until"])
        except torch.OutOfMemoryError:
            if len(signed) == 1:
                raise
        torch.cuda.empty_cache()
        self.batch = -(-len(signed) // 2)
        return torch.cat([self._invert(part, label) for part in signed.split(self.batch)])


def _inverted(pretrained: Pretrained, weights: Mapping[str, Weights], params: Mapping[str, Any], device: str) -> Inverted:
    return Inverted(pretrained, weights, device, params)
