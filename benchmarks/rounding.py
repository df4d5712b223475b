"""What it costs to store the images of DM as bytes, as JSON: accuracies of students on the optimised values and on bytes.

    python benchmarks/rounding.py                          embedded Fashion-MNIST, 10 images per class
    python benchmarks/rounding.py k=1 steps=1000           another set
    python benchmarks/rounding.py data.path=FOLDER data.size=32 data.channels=3

DM publishes sets of unbounded values; here a set is stored as 8-bit pixels. Three sets from one optimisation are compared:
its values as they are (`values`), clamped to the range of pixels (`clamped`), and rounded to bytes (`bytes`). `outside` is
the share of values outside of the range. Students of the same seed have the same weights and batches, so that `difference`,
the mean difference from `values` with its standard error, is not blurred by the spread of students.

Needs torch, numpy, pyarrow, pydantic, pyyaml and pillow, and no Ray.
"""

from __future__ import annotations

import json
import math
import platform
import sys
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ims3_ray.cli import main
from ims3_ray.config import DataConfig, ProtocolConfig, Section
from ims3_ray.engine.inputs import decoded_split
from ims3_ray.synthesis.base import Given, Inputs
from ims3_ray.synthesis.dm import DM
from ims3_ray.synthesis.pixels import to_bytes
from ims3_ray.training.accuracy import Labelled
from ims3_ray.training.students import train_student

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROTOCOL: dict[str, Any] = {
    "epochs": 300, "batch_size": 256, "pad_to": 32, "decay": "halfway", "validations": 1,
    "augment": {"max_shift": 0, "dsa": ("color", "crop", "cutout", "flip", "scale", "rotate")},
}  # fmt: skip


class BenchmarkConfig(Section):
    data: DataConfig = DataConfig()
    k: int = Field(default=10, ge=1)
    """Images per class."""
    steps: int = Field(default=300, ge=1)
    """Steps of DM."""
    width: int = Field(default=32, ge=1)
    """Channels of every layer of the ConvNet-3, for DM and for students."""
    students: int = Field(default=3, ge=2)
    epochs: int = Field(default=300, ge=1)
    """Epochs of each student, by the protocol of DSA otherwise."""


def optimised(config: BenchmarkConfig, train: Labelled, classes: int) -> Labelled:
    """A set by DM from the first K images of each class: values where pixels are in [0, 1], and labels."""
    pixels, labels = train
    real = [pixels[labels == position] for position in range(classes)]
    scaled = pixels.float() / 255
    statistics = tuple(
        f(scaled.transpose(0, 1).flatten(1), dim=1).reshape(-1, 1, 1).to(DEVICE) for f in (torch.mean, torch.std)
    )
    inputs: dict[str, Any] = {
        "num_classes": classes, "seed": 0, "device": DEVICE, "size": config.data.size, "channels": config.data.channels,
        "counts": [len(each) for each in real], "real": real.__getitem__, "statistics": statistics,
    }  # fmt: skip
    method = DM(DM.Config(steps=config.steps, width=config.width))
    pieces = {piece: method.prepare(piece, Inputs(**inputs)) for piece in method.pieces(method.config, inputs["counts"])}
    made = [
        method.optimised(
            Given(
                pixels=real[position][: config.k], classes=torch.full((config.k,), position), indices=torch.arange(config.k),
                prepared=pieces.__getitem__, **inputs,
            ), None, lambda *_: None,
        ).cpu()
        for position in range(classes)
    ]  # fmt: skip
    return torch.cat(made), torch.arange(classes).repeat_interleave(config.k)


def benchmark(config: BenchmarkConfig) -> None:
    (train_pixels, train_labels, names), _ = decoded_split(config.data, "train")
    (test_pixels, test_labels, _), _ = decoded_split(config.data, "test")
    values, labels = optimised(config, (train_pixels, train_labels), len(names))
    sets: dict[str, Tensor] = {"values": 255 * values, "clamped": 255 * values.clamp(0, 1), "bytes": to_bytes(values)}
    protocol = ProtocolConfig.model_validate({**PROTOCOL, "width": config.width, "epochs": config.epochs})

    def accuracy_of(pixels: Tensor, seed: int) -> float:
        test = test_pixels, test_labels
        return train_student("convnet-3", (pixels, labels), test, len(names), protocol, seed, device=DEVICE)[1].last

    accuracies = {name: [accuracy_of(pixels, seed) for seed in range(config.students)] for name, pixels in sets.items()}
    rows = []
    for name, found in accuracies.items():
        difference = torch.tensor(found) - torch.tensor(accuracies["values"])
        error = difference.std().item() / math.sqrt(len(found))
        rows.append({
            "set": name, "accuracies": [round(each, 2) for each in found],
            "difference": round(difference.mean().item(), 2), "standard_error": round(error, 2),
        })  # fmt: skip
    machine = {"cpu": platform.processor() or platform.machine(), "torch": torch.__version__}
    outside = ((values < 0) | (values > 1)).float().mean().item()
    settings = config.model_dump(mode="json", exclude={"data"})
    print(
        json.dumps(
            {"machine": machine, "data": config.data.path, **settings, "outside": round(outside, 3), "sets": rows}, indent=1
        )
    )


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
