"""Images and labels as PyTorch tensors (`images.pt`, `labels.pt`): the form in which DD-Ranking reads sets."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ims3_ray.data.sources.base import SLACK, Source, check_labels, check_logits, numbered
from ims3_ray.data.sources.location import Location
from ims3_ray.data.transforms import to_pil
from ims3_ray.errors import UserError, first_line
from ims3_ray.io.files import Place

IMAGES, LABELS, NAMES, NORMALISATION = "images.pt", "labels.pt", "classes.txt", "normalisation.json"
EXAMPLE = '{"mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}'


class TensorSource(Source):
    """Tensors in a folder, a set: `images.pt` ([N, C, H, W], values in [0, 1], or bytes) and `labels.pt` ([N] class numbers, or
    [N, num_classes] soft labels as logits), the class names in `classes.txt`, one a line in the order of the numbers, and
    for images that are normalised `normalisation.json` (`{"mean": […], "std": […]}`)."""

    name, order = "tensors", 15

    @classmethod
    def find(cls, place: Location) -> Source | None:
        files = {file.name: file for file in place.children if file.is_file}
        if place.split != "train" or not {IMAGES, LABELS} <= files.keys():
            return None
        return cls(place.path, files)

    def __init__(self, location: str, files: dict[str, Place]) -> None:
        self.location = location
        self.files = [files[name] for name in (IMAGES, LABELS, NAMES, NORMALISATION) if name in files]
        images, labels = (_tensor(location, files[name]) for name in (IMAGES, LABELS))
        if images.dim() != 4 or images.shape[1] not in (1, 3):
            raise UserError(f"'{location}/{IMAGES}' has the shape {tuple(images.shape)}, which is not [N, 1 or 3, H, W]")
        if not len(images):
            raise UserError(f"'{location}/{IMAGES}' holds no image")
        _check_labels(labels, len(images), f"{location}/{LABELS}")
        self._logits = labels.float().numpy() if labels.dim() == 2 else None
        self.labels = (labels if self._logits is None else labels.argmax(dim=1)).long().numpy()
        self._pixels = _bytes(images, location, files.get(NORMALISATION))
        counted = self.labels if self._logits is None else np.arange(self._logits.shape[1])
        self.class_names = tuple(files[NAMES].lines()) if NAMES in files else numbered(counted)
        check_labels(location, self.labels, self.class_names)

    def image(self, index: int) -> Image.Image:
        return to_pil(self._pixels[index])

    def stored(self, index: int) -> bytes:
        return self._pixels[index].numpy().tobytes()

    def identify(self, index: int) -> str:
        return f"{IMAGES}[{index}]"

    def extras(self, indices: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        return {} if self._logits is None else {"logits": self._logits[list(indices)]}


def _tensor(location: str, file: Place) -> torch.Tensor:
    """The one tensor in a file, read with PyTorch's restricted unpickler."""
    try:
        found = torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, IndexError, OSError) as error:
        raise UserError(
            f"'{location}/{file.name}' is not a readable PyTorch file of one tensor ({first_line(error)})"
        ) from error
    if not isinstance(found, torch.Tensor):
        raise UserError(f"'{location}/{file.name}' holds a {type(found).__name__}, not one tensor; save the tensor alone")
    return found.detach()


def _check_labels(labels: torch.Tensor, count: int, path: str) -> None:
    """Raises :class:`UserError` unless ``labels`` are class numbers [N] or finite logits [N, num_classes]."""
    if len(labels) != count or labels.dim() not in (1, 2) or (labels.dim() == 2 and labels.shape[1] < 2):
        raise UserError(
            f"'{path}' has the shape {tuple(labels.shape)} for {count} images; it must be [{count}] or [{count}, num_classes]"
        )
    if labels.dim() == 1:
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise UserError(f"'{path}' holds values of type {labels.dtype} as class numbers; save integers")
        return
    if not labels.is_floating_point():
        raise UserError(f"'{path}' holds soft labels that are no finite floating-point numbers; save logits")
    check_logits(labels.float().numpy(), path)


def _bytes(images: torch.Tensor, location: str, normalisation: Place | None) -> torch.Tensor:
    """Images as bytes [N, C, H, W]. Raises :class:`UserError` for values that are not in [0, 1] once a given normalisation is
    undone."""
    if images.dtype == torch.uint8:
        if normalisation is not None:
            raise UserError(f"'{location}/{IMAGES}' holds bytes, which are not normalised; remove {NORMALISATION}")
        return images
    pixels = images.float()
    if normalisation is not None:
        try:
            told = json.loads(normalisation.read())
            mean, std = (torch.tensor([float(v) for v in told[key]]).view(1, pixels.shape[1], 1, 1) for key in ("mean", "std"))
            pixels = pixels * std + mean
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(
                f"'{location}/{NORMALISATION}' is not {EXAMPLE} with a number for each channel; correct it"
            ) from error
    if not pixels.isfinite().all() or pixels.min() < -SLACK or pixels.max() > 1 + SLACK:
        raise UserError(
            f"'{location}/{IMAGES}' has values from {pixels.min():.2f} to {pixels.max():.2f}, not from 0 to 1; if it is "
            f"normalised, write the mean and the standard deviation of each channel into {NORMALISATION}, as {EXAMPLE}"
        )
    return (255 * pixels.clamp(0, 1)).round().to(torch.uint8)
