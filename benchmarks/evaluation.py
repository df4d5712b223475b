"""Epochs/s of a student, as JSON: images and augmentation on the device, compared with a DataLoader with PIL transforms.

    python benchmarks/evaluation.py                                ConvNet-3 on CPUs; ResNetAP-10 at 224 pixels on a GPU
    python benchmarks/evaluation.py student=convnet-6 size=224     another student
    python benchmarks/evaluation.py 'cases=[device]'               one of the cases

All cases train the same student with the augmentation of Minimax's hard-label protocol (crop, mirroring, jitter, lighting,
CutMix) on random images, since speed does not depend on the images. `DataLoader` works as that protocol's code does: decoded
images in memory, transformed one by one in worker processes that are kept from epoch to epoch; in `workers started each epoch`
they are not. Validation is left out. The cases take turns, and the fastest turn of each counts, since other load on the machine
can only make them slower. `share` is the rate of the student's own operations divided by the matmul rate of the device, the
best that was measured before the turns; `speedup` is relative to `DataLoader`.

Needs torch, torchvision, numpy, pydantic, pyyaml and pillow, and no Ray.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from ims3_ray.cli import main
from ims3_ray.cluster.speed import measured_rate
from ims3_ray.config import ProtocolConfig, Section
from ims3_ray.data.augment import EIGENVALUES, EIGENVECTORS, cutmix
from ims3_ray.data.transforms import to_pil
from ims3_ray.errors import UserError
from ims3_ray.models.student_costs import forward_flops
from ims3_ray.training.augmented import IMAGENET_MEAN, IMAGENET_STD
from ims3_ray.training.students import Training

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
CLASSES = 10
WARM_UP = 2
TURN_S = 2.0
"""Seconds of a turn of a case."""


class BenchmarkConfig(Section):
    student: str = "resnetap-10" if GPU else "convnet-3"
    width: int = Field(default=128 if GPU else 32, ge=1)
    """Channels of every layer of a ConvNet."""
    size: int = Field(default=224 if GPU else 32, ge=8)
    images_per_class: int = Field(default=10, ge=1)
    workers: int = Field(default=8 if GPU else 2, ge=0)
    """Number of worker processes of the DataLoader."""
    seconds: float = Field(default=20, gt=0)
    """Approximate time for which each case is timed, in seconds."""
    cases: tuple[str, ...] = ()
    """Names of the cases to run; all cases when empty."""


def protocol_of(config: BenchmarkConfig, **changes: Any) -> ProtocolConfig:
    augment = {"crop": (0.5, 1.0), "flip": True, "jitter": 0.4, "lighting": 0.1}
    values = {"width": config.width, "normalise": "imagenet", "epochs": 10**6, "augment": augment, "cutmix": True}
    return ProtocolConfig.model_validate({**values, **changes})


def images_of(config: BenchmarkConfig) -> tuple[Tensor, Tensor]:
    labels = torch.arange(CLASSES).repeat_interleave(config.images_per_class)
    rng = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (len(labels), 3, config.size, config.size), generator=rng).to(torch.uint8), labels


def on_the_device(config: BenchmarkConfig, **changes: Any) -> Callable[[], object]:
    """An epoch of the project's own training."""
    return Training(config.student, images_of(config), CLASSES, protocol_of(config, **changes), 0, DEVICE).epoch


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Decoded images in memory, each transformed when it is read."""

    def __init__(self, pixels: Tensor, labels: Tensor) -> None:
        from torchvision import transforms

        self.images, self.labels = [to_pil(image) for image in pixels], labels.tolist()
        self.components = torch.tensor(EIGENVECTORS) * torch.tensor(EIGENVALUES)
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(pixels.shape[-1], scale=(0.5, 1.0)), transforms.RandomHorizontalFlip(),
            transforms.ColorJitter(0.4, 0.4, 0.4), transforms.ToTensor(), self._light,
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])  # fmt: skip

    def _light(self, image: Tensor) -> Tensor:
        return image + (self.components @ (0.1 * torch.randn(3)))[:, None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), self.labels[index]


def through_a_loader(config: BenchmarkConfig, kept: bool) -> Callable[[], object]:
    """An epoch of the same student fed by a DataLoader."""
    training = Training(config.student, images_of(config), CLASSES, protocol_of(config), 0, DEVICE)
    loader = torch.utils.data.DataLoader(
        Pictures(*images_of(config)), batch_size=training.batch_size, shuffle=True, num_workers=config.workers,
        pin_memory=GPU, persistent_workers=kept and config.workers > 0,
    )  # fmt: skip

    def epoch() -> None:
        training.student.train()
        for images, labels in batches(loader):
            images, order, share = cutmix(images, training.batches.cpu_rng)
            logits = training.student.net(images)
            loss = share * F.cross_entropy(logits, labels) + (1 - share) * F.cross_entropy(logits, labels[order])
            training.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            training.optimizer.step()
        training.decay.step()

    return epoch


def batches(loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    for images, labels in loader:
        yield images.to(DEVICE, non_blocking=True), labels.to(DEVICE, non_blocking=True)


CASES: dict[str, Callable[[BenchmarkConfig], Callable[[], object]]] = {
    "DataLoader": lambda config: through_a_loader(config, kept=True),
    "DataLoader, workers started each epoch": lambda config: through_a_loader(config, kept=False),
    "device": on_the_device,
    "device, bf16": lambda config: on_the_device(config, precision="bf16"),
}


def benchmark(config: BenchmarkConfig) -> None:
    if unknown := set(config.cases) - set(CASES):
        raise UserError(f"there is no case '{min(unknown)}'; choose from: {'; '.join(CASES)}")
    flops = forward_flops(config.student, 3, config.size, CLASSES, "instance", config.width)
    work, rows = 3 * flops * CLASSES * config.images_per_class, []
    seconds, rates = in_turns({name: CASES[name](config) for name in config.cases or CASES}, config.seconds)
    for name in seconds:
        share = work / seconds[name] / rates["bf16" in name]
        rows.append({"case": name, "epochs_per_s": round(1 / seconds[name], 3), "share": round(share, 4)})
        if "DataLoader" in seconds:
            rows[-1]["speedup"] = round(seconds["DataLoader"] / seconds[name], 2)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if GPU:
        machine["gpu"] = torch.cuda.get_device_name()
    images = CLASSES * config.images_per_class
    print(
        json.dumps(
            {"machine": machine, "student": config.student, "size": config.size, "images": images, "cases": rows}, indent=1
        )
    )


def in_turns(epochs: dict[str, Callable[[], object]], seconds: float) -> tuple[dict[str, float], dict[bool, float]]:
    """Seconds of an epoch of each case, the least over its turns, which last some seconds each and ``seconds`` in all; and the
    matmul rate of bfloat16 (True) and float32 (False), the best over the turns."""
    for epoch in epochs.values():
        for _ in range(WARM_UP):
            epoch()
    best, rates = dict.fromkeys(epochs, float("inf")), {True: 0.0, False: 0.0}
    for _ in range(max(2, round(seconds / TURN_S))):
        for name, epoch in epochs.items():
            bf16 = "bf16" in name
            rates[bf16] = max(rates[bf16], measured_rate(DEVICE, torch.bfloat16 if bf16 else torch.float32))
            best[name] = min(best[name], seconds_per_epoch(epoch, min(TURN_S, seconds), warm_up=0, least=1))
    return best, rates


def seconds_per_epoch(epoch: Callable[[], object], budget: float, warm_up: int = WARM_UP, least: int = 3) -> float:
    for _ in range(warm_up):
        epoch()
    wait()
    began, count = time.perf_counter(), 0
    while count < least or time.perf_counter() - began < budget:
        epoch()
        wait()
        count += 1
    return (time.perf_counter() - began) / count


def wait() -> None:
    if GPU:
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main(__doc__ or "", BenchmarkConfig, benchmark))
