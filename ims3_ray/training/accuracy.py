"""Tests of a student: when they are made, on which images, and what they say."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ims3_ray.data.augment import resize
from ims3_ray.errors import Diverged

RESIDENT_BYTES = 2**32
"""Size in bytes; images that exceed it stay on the host and are sent to the device in batches."""
SCALED_VALUES = 2**24
"""Number of values of images that are scaled at a time, as floating-point numbers."""
TEST_PIXELS, TEST_BATCH = 2**23, 500
"""The most pixels (of one channel) and the most images in a batch of test images."""

Labelled = tuple[Tensor, Tensor]
"""uint8 images [N, C, H, W] and the positions of their classes [N]."""


@dataclass(frozen=True)
class Check:
    """A validation: the mean training loss since the previous validation, and accuracies in per cent."""

    epoch: int
    loss: float
    test: float
    val: float | None


@dataclass(frozen=True)
class Accuracy:
    """Test accuracies in per cent: of the final weights, and of the weights that two rules of early stopping would keep."""

    last: float
    """Test accuracy of the final weights."""
    best: float
    """Test accuracy of the epoch that is best on the test split itself, which is what the papers report."""
    val: float | None
    """Test accuracy of the epoch that is best on held-out training images; None without such images."""
    curve: list[Check] = field(repr=False)
    confusion: Tensor = field(repr=False)
    """Confusion matrix of the final weights, int32 [C, C]: counts of test images by true (row) and predicted class (column)."""


def validation_epochs(epochs: int, validations: int, validate_from: float) -> set[int]:
    """Epochs after which to validate, evenly spaced after the share ``validate_from`` of all epochs; the last is among them."""
    first = int(epochs * validate_from)
    return {max(1, first + round((epochs - first) * (i + 1) / validations)) for i in range(validations)}


def resident(pixels: Tensor, size: int, keep: float = 1.0) -> Tensor:
    """Centre crops, of the share ``keep`` of each side, scaled to uint8 images [N, C, size, size]."""
    whole = pixels.shape[-1]
    side = max(1, round(whole * keep))
    start = (whole - side) // 2
    pixels = pixels[..., start : start + side, start : start + side]
    if side == size:
        return pixels.contiguous()
    if not len(pixels):
        return pixels.new_empty((0, pixels.shape[1], size, size))
    at_once = max(1, SCALED_VALUES // pixels[0].numel())
    parts = [(resize(part.float() / 255, size) * 255).round().clamp(0, 255).to(torch.uint8) for part in pixels.split(at_once)]
    return torch.cat(parts)


def on_device(pixels: Tensor, device: str) -> Tensor:
    """Images on a device, or where they are if they exceed :data:`RESIDENT_BYTES`."""
    return pixels.to(device) if pixels.numel() <= RESIDENT_BYTES else pixels


@torch.inference_mode()
def confusion_of(student: nn.Module, data: Labelled, num_classes: int, device: str = "cpu") -> Tensor:
    """Confusion matrix of ``student``, int64 [C, C]: counts of images by true class (row) and predicted class (column).

    Raises :class:`Diverged` if a score is not finite, since its class would be arbitrary.
    """
    student.eval()
    batch = max(1, min(TEST_BATCH, TEST_PIXELS // data[0].shape[-1] ** 2))
    parts = []
    finite = torch.tensor(True, device=device)
    for pixels in data[0].split(batch):
        scores = student(pixels.to(device))
        finite &= scores.isfinite().all()
        parts.append(scores.argmax(dim=1))
    if not finite:
        raise Diverged("a student's scores are not finite, so it has diverged; lower the protocol's lr")
    predicted = torch.cat(parts).cpu()
    return (data[1] * num_classes + predicted).bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


def accuracy_of(student: nn.Module, data: Labelled, num_classes: int, device: str = "cpu") -> float:
    """Share of images, in per cent, that ``student`` classifies correctly."""
    table = confusion_of(student, data, num_classes, device)
    return 100 * int(table.trace()) / int(table.sum())
