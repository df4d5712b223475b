"""Training a student on a small labelled set and testing it on real images (ground floor: tensors in, accuracies out)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
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


def train_student(
    train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], num_classes: int, config: EvaluationConfig, seed: int,
    device: str = "cpu",
) -> Accuracy:  # fmt: skip
    """Train a ConvNet from scratch on uint8 ``train`` images [N, C, H, W] and test it on ``test``.

    SGD with momentum, cosine decay to zero, random shifts (and mirroring if set), hard labels. All images stay on
    the device. Input is normalised by mean and deviation of the training images.
    """
    generator = torch.Generator().manual_seed(seed_for(seed, "student"))
    torch.manual_seed(seed_for(seed, "student-init"))
    images, labels = to_signed(train[0]).to(device), train[1].to(device)
    mean, std = images.mean(), images.std()
    images = (images - mean) / std
    model = ConvNet(images.shape[1], images.shape[2], num_classes, config.width, config.depth).to(device)
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
            loss = F.cross_entropy(model(batch), labels[index.to(device)])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            decay.step()
        if epoch in checks:
            curve.append((epoch, _accuracy(model, test, mean, std, device)))
    return Accuracy(last=curve[-1][1], best=max(a for _, a in curve), curve=curve)


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
def _accuracy(model: ConvNet, test: tuple[Tensor, Tensor], mean: Tensor, std: Tensor, device: str) -> float:
    model.eval()
    right = 0
    for pixels, labels in zip(test[0].split(500), test[1].split(500), strict=True):
        logits = model((to_signed(pixels.to(device)) - mean) / std)
        right += int((logits.argmax(dim=1).cpu() == labels).sum())
    return 100 * right / len(test[1])
