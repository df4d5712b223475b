"""Training a student on a small labelled set and testing it on real images (ground floor: tensors in, accuracies out)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ims3_ray.config import EvaluationConfig
from ims3_ray.data.transforms import to_signed
from ims3_ray.models.students import ConvNet
from ims3_ray.seeds import seed_for


@dataclass(frozen=True)
class Accuracy:
    """Test accuracy in per cent: of the final weights, and of the best of the validations."""

    last: float
    best: float
    curve: list[tuple[int, float]]
    """(epoch, accuracy) of each validation."""


class Student(nn.Module):
    """A ConvNet that takes uint8 images [B, C, H, W] and normalises them as its training images were."""

    def __init__(self, images: Tensor, num_classes: int, config: EvaluationConfig) -> None:
        super().__init__()
        signed = to_signed(images)
        self.mean, self.std = signed.mean().item(), signed.std().item()
        self.net = ConvNet(images.shape[1], images.shape[2], num_classes, config.width, config.depth)

    def normalise(self, pixels: Tensor) -> Tensor:
        return (to_signed(pixels) - self.mean) / self.std

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, num_classes]."""
        return self.net(self.normalise(pixels))


def train_student(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, config: EvaluationConfig, seed: int,
    device: str = "cpu",
) -> tuple[Student, Accuracy]:  # fmt: skip
    """Train a ConvNet from scratch on uint8 ``train`` images [N, C, H, W] and test it on ``test``.

    SGD with momentum, cosine decay to zero, random shifts (and mirroring if set), hard labels. All images stay on
    the device. Input is normalised by mean and deviation of the training images.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "student"))
    torch.manual_seed(seed_for(seed, "student-init"))
    model = Student(train[0], num_classes, config).to(device)
    images, labels = model.normalise(train[0].to(device)), train[1].to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=True
    )
    per_epoch = -(-len(labels) // config.batch_size)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * per_epoch)
    checks = {max(1, round(config.epochs * (i + 1) / config.validations)) for i in range(config.validations)}
    curve = []
    for epoch in range(1, config.epochs + 1):
        model.train()
        for index in torch.randperm(len(labels), generator=generator).split(config.batch_size):
            batch = augment(images[index.to(device)], config.max_shift, config.flip, generator)
            loss = F.cross_entropy(model.net(batch), labels[index.to(device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay.step()
        if epoch in checks:
            curve.append((epoch, accuracy_of(model, test, device)))
    return model, Accuracy(last=curve[-1][1], best=max(a for _, a in curve), curve=curve)


def augment(images: Tensor, max_shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to ``max_shift`` pixels in both directions (edges repeated) and perhaps mirrored."""
    B, _, H, W = images.shape
    if max_shift:
        padded = F.pad(images, (max_shift,) * 4, mode="replicate")
        offset = torch.randint(2 * max_shift + 1, (2, B), generator=generator).to(images.device)
        rows = offset[0][:, None] + torch.arange(H, device=images.device)
        columns = offset[1][:, None] + torch.arange(W, device=images.device)
        which = torch.arange(B, device=images.device)[:, None, None]
        images = padded.permute(0, 2, 3, 1)[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    if flip:
        mirrored = (torch.rand(B, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images


@torch.inference_mode()
def accuracy_of(student: Student, test: tuple[Tensor, Tensor], device: str = "cpu") -> float:
    """Share of ``test`` images, in per cent, that ``student`` labels as they are labelled."""
    student.eval()
    right = 0
    for pixels, labels in zip(test[0].split(500), test[1].split(500), strict=True):
        right += int((student(pixels.to(device)).argmax(dim=1).cpu() == labels).sum())
    return 100 * right / len(test[1])
