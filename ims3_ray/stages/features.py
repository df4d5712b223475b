"""φ at work on the images of a unit: their features and, where φ knows the classes, its scores. It needs no Ray."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ims3_ray.data.transforms import to_signed
from ims3_ray.engine.images import Derived, Produced, batches
from ims3_ray.engine.shards import pack_tensors, parse_unit
from ims3_ray.models.encoder import Encoder


class Features:
    """Computes ``features`` float32 [n, D], φ(x) of each image, as safetensors.

    With ``heads`` it adds what φ's own classifier says of the image's class: ``log_probability`` float32 [n], and
    ``recognised`` bool [n], whether that class has the highest score.
    """

    batch = 250

    def __init__(self, encoder: Encoder, device: str, heads: Mapping[str, int] | None = None) -> None:
        self.encoder, self.device, self.heads = encoder.to(device), device, heads
        """``heads``: label of a unit's class, as text → index of that class in φ's classifier."""

    @torch.inference_mode()
    def __call__(self, unit: str, produced: Produced) -> Derived:
        """Raises ``ValueError`` naming the first image whose features are not all finite."""
        parts = self._parts(produced.pixels)
        found = [features.float().cpu() for features, _ in parts]
        features = torch.cat(found) if found else torch.zeros(0, self.encoder.dim)
        if (bad := (~features.isfinite().all(dim=1)).nonzero()).numel():
            raise ValueError(f"φ gives values that are not finite for {produced.names[int(bad[0])]}")
        tensors = {"features": features}
        if self.heads is not None:
            index = self.heads[str(parse_unit(unit)[0])]
            scores = [logits.float().cpu() for _, logits in parts] or [torch.zeros(0, index + 1)]
            log_probability = torch.cat(scores).log_softmax(dim=1)
            tensors["log_probability"] = log_probability[:, index]
            tensors["recognised"] = log_probability.argmax(dim=1) == index
        return Derived("safetensors", pack_tensors(**tensors))

    def of_images(self, pixels: Tensor) -> Tensor:
        """φ(x) of uint8 images [n, C, H, W], float32 [n, D] on the CPU."""
        return self.seen(pixels)[0]

    @torch.inference_mode()
    def seen(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """φ(x) of uint8 images [n, C, H, W] and the class scores of φ's own classifier, float32 on the CPU."""
        features, scores = zip(*self._parts(pixels), strict=True)
        return torch.cat([part.float().cpu() for part in features]), torch.cat([part.float().cpu() for part in scores])

    def _parts(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [seen for part in batches(pixels, self.batch, self.device) for seen in self._look(part)]

    def _look(self, pixels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Features and class scores. A batch that does not fit into memory is halved: φ treats each image independently."""
        try:
            return [self.encoder.look(to_signed(pixels))]
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
        torch.cuda.empty_cache()
        self.batch = -(-len(pixels) // 2)
        return [seen for part in pixels.split(self.batch) for seen in self._look(part)]
