"""Training of a student on a small labelled set, and its test on real images.

All training images stay on the device and are augmented there, a batch at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ims3_ray.config import ProtocolConfig
from ims3_ray.data.augment import Scale, padded
from ims3_ray.errors import Diverged, UserError
from ims3_ray.models.students import batch_of_one, build_student, has_batch_norm
from ims3_ray.saving import Save, Saver, unpack_state
from ims3_ray.seeds import seed_for
from ims3_ray.training.accuracy import Accuracy, Check, Labelled, confusion_of, on_device, resident, validation_epochs
from ims3_ray.training.augmented import AugmentedBatches, Batch, epochs_and_batch_size, scale_of


class LabelledSet(NamedTuple):
    """A set to train on. Fields that are None are not part of the set."""

    pixels: Tensor
    """Images, uint8 [N, C, H, W]."""
    labels: Tensor
    """Positions of the classes, int64 [N]."""
    logits: Tensor | None = None
    """Soft labels as a teacher's logits, float [N, num_classes]."""
    weights: Tensor | None = None
    """Weight of each image in the loss, float [N]; weights are scaled to a mean of 1."""


Teacher = Callable[[Tensor], Tensor]
"""Maps images in [0, 1], [B, C, H, W], to logits [B, num_classes]."""

BatchLabels = Callable[[int], Tensor]
"""Maps the number of an epoch to the teacher's logits of its shared batches, one after another, [N, num_classes]."""


class Student(nn.Module):
    """A network that takes uint8 images [B, C, size, size] and normalises them as the protocol specifies."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, images: Tensor, num_classes: int, protocol: ProtocolConfig,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """``images`` are those of the set; ``statistics``, those of the real pixels, are for protocols that ask for them."""
        super().__init__()
        channels, size = images.shape[1:3]
        scale = scale_of(images, protocol, statistics)
        self.register_buffer("mean", scale.mean)
        self.register_buffer("std", scale.std)
        self.pad_to = protocol.pad_to
        size = max(size, protocol.pad_to or 0)
        self.net = build_student(name, channels, size, num_classes, protocol.norm, protocol.width)

    @property
    def scale(self) -> Scale:
        return Scale(self.mean, self.std)

    def scores(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] of images in [0, 1]."""
        return self.net(padded((images - self.mean) / self.std, self.pad_to))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.scores(pixels.float() / 255)


class Training:
    """A student in training. If labels are soft, ``teacher`` labels every batch; ``batch_labels`` are the stored labels of an
    epoch's batches."""

    def __init__(
        self, name: str, train: LabelledSet | Labelled, num_classes: int, protocol: ProtocolConfig, seed: int,
        device: str = "cpu", teacher: Teacher | None = None, batch_labels: BatchLabels | None = None,
        statistics: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        train = LabelledSet(*train)
        if protocol.labels == "soft" and teacher is None:
            raise ValueError("soft labels need a teacher")
        if protocol.labels == "stored_batches" and batch_labels is None:
            raise ValueError("labels of batches need batch_labels")
        if protocol.labels == "stored" and train.logits is None:
            raise ValueError("the set has no stored soft labels")
        self.protocol, self.device, self.teacher, self.batch_labels = protocol, device, teacher, batch_labels
        self.seed = seed
        self.size = protocol.size or train.pixels.shape[-1]
        self.logits = train.logits.to(device).float() if protocol.labels == "stored" and train.logits is not None else None
        self.weights = (train.weights / train.weights.mean()).to(device) if train.weights is not None else None
        torch.manual_seed(seed_for(seed, "student-init"))
        images, self.labels = on_device(resident(train.pixels, self.size), device), train.labels.to(device)
        self.student = Student(name, images, num_classes, protocol, statistics).to(device)
        if device != "cpu":
            self.student.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.epochs, self.batch_size = epochs_and_batch_size(protocol, train.labels)
        self.batched = has_batch_norm(self.student.net)
        if self.batched and self.batch_size == 1:
            raise UserError(batch_of_one(name))
        self.optimizer = _optimizer(self.student, protocol)
        self.decay = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda epoch: decay_factor(protocol.decay, epoch, self.epochs)
        )
        shared = protocol.labels == "stored_batches"
        self.batches = AugmentedBatches(images, protocol, self.batch_size, self.student.scale, seed, device, shared)
        self.autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=protocol.precision == "bf16")

    def epoch(self) -> Tensor:
        """Train on every image once; returns the mean loss of the batches, still on the device."""
        self.student.train()
        losses, number, seen = [], self.decay.last_epoch, 0
        torch.manual_seed(seed_for(self.seed, "student-epoch", number))  # what dropout draws does not depend on interruptions
        stored = self.batch_labels(number).to(self.device) if self.batch_labels is not None else None
        for batch in self.batches.epoch(number):
            count = len(batch.members)
            first, seen = seen, seen + count
            if count == 1 and self.batch_size > 1 and (self.batched or self.protocol.norm == "batch"):
                continue  # batch statistics need more than one image
            loss = self._loss(batch, None if stored is None else stored[first:seen])
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        self.decay.step()
        return torch.stack(losses).mean()

    def state_dict(self) -> dict[str, Any]:
        """Everything that is needed to resume the training, possibly on another machine."""
        return {
            "student": self.student.state_dict(), "optimizer": self.optimizer.state_dict(), "decay": self.decay.state_dict(),
            "kind": torch.device(self.device).type, **{name: rng.get_state() for name, rng in self._generators().items()},
        }  # fmt: skip

    def continues(self, state: Mapping[str, Any]) -> bool:
        """Whether a state of :meth:`state_dict` was saved on the same kind of device: another one draws other random
        numbers."""
        return bool(state.get("kind") == torch.device(self.device).type)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("student", "optimizer", "decay"):
            getattr(self, name).load_state_dict(state[name])
        for name, rng in self._generators().items():
            rng.set_state(state[name])

    def _generators(self) -> dict[str, torch.Generator]:
        """The random generators that go on from epoch to epoch: none where each epoch begins with new ones."""
        return {} if self.batches.shared else {"cpu_rng": self.batches.cpu_rng, "rng": self.batches.rng}

    def _loss(self, batch: Batch, stored: Tensor | None = None) -> Tensor:
        """The loss of a batch, for which ``stored`` are the teacher's logits, if they are stored."""
        p, (images, members, order, share) = self.protocol, batch
        labels = self.labels[members]
        if p.second_pass:
            with torch.no_grad(), self.autocast:
                self.student.scores(images)
        with self.autocast:
            logits = self.student.scores(images)
        logits = logits.float()
        if self.teacher is not None or stored is not None:
            with torch.no_grad():
                wanted = self.teacher(images) if self.teacher is not None else stored
            assert wanted is not None
            return self._mean(soft_label_loss(logits, wanted, p.temperature, self._reduction), members)
        if self.logits is None:
            loss = self._hard(logits, labels, members)
            return loss if order is None else share * loss + (1 - share) * self._hard(logits, labels[order], members[order])
        of_images = self.logits[members]
        loss = self._mean(soft_label_loss(logits, of_images, p.temperature, self._reduction), members)
        if order is None:
            return loss
        other = soft_label_loss(logits, of_images[order], p.temperature, self._reduction)
        return share * loss + (1 - share) * self._mean(other, members[order])

    def _hard(self, logits: Tensor, labels: Tensor, members: Tensor) -> Tensor:
        return self._mean(F.cross_entropy(logits, labels, reduction=self._reduction), members)

    @property
    def _reduction(self) -> str:
        return "mean" if self.weights is None else "none"

    def _mean(self, loss: Tensor, members: Tensor) -> Tensor:
        """The mean loss of a batch, weighted if the set has weights."""
        return loss if self.weights is None else (loss * self.weights[members]).mean()


def train_student(
    name: str, train: LabelledSet | Labelled, test: Labelled, num_classes: int, protocol: ProtocolConfig, seed: int,
    *, device: str = "cpu", val: Labelled | None = None, teacher: Teacher | None = None, resume: bytes | None = None,
    save: Save | None = None, batch_labels: BatchLabels | None = None, statistics: tuple[Tensor, Tensor] | None = None,
) -> tuple[Student, Accuracy]:  # fmt: skip
    """Train student ``name`` from scratch on ``train`` by ``protocol``, test it on ``test`` and, if given, ``val``, which hold
    images of the size that students take, cropped as the protocol says (:func:`ims3_ray.training.accuracy.resident`).

    Where the protocol's epochs or batch size depend on the images per class, the size of the largest class counts. The same
    seed on the same kind of device yields the same student. ``statistics`` are the mean and standard deviation of the real
    training pixels in [0, 1], [C, 1, 1] each. Raises ``ValueError`` for test images of another size, for soft labels without a
    ``teacher``, stored labels of batches without ``batch_labels``, and ``normalise: real`` without ``statistics``.

    ``save`` is called with the state of the training after an epoch, at most every :data:`ims3_ray.saving.SAVE_EVERY_S`
    seconds. With such a state as ``resume`` the training continues from there and yields the same student; a state that was
    saved on another kind of device is not used, and the training begins anew.
    """
    teacher = teacher if protocol.labels == "soft" else None
    training = Training(name, train, num_classes, protocol, seed, device, teacher, batch_labels, statistics)
    student, tests = training.student, {"test": test}
    if val is not None and len(val[1]):
        tests["val"] = val
    if wrong := next((key for key, data in tests.items() if data[0].shape[-1] != training.size), None):
        raise ValueError(f"{wrong} holds images of {tests[wrong][0].shape[-1]} pixels, and students take {training.size}")
    tests = {key: (on_device(pixels, device), labels) for key, (pixels, labels) in tests.items()}
    checks = validation_epochs(training.epochs, protocol.validations, protocol.validate_from)
    curve, losses, confusions, first = [], [], {}, 1
    if resume is not None:
        state = unpack_state(resume, "cpu")
        if training.continues(state["training"]):
            training.load_state_dict(state["training"])
            curve, losses = [Check(*check) for check in state["curve"]], [loss.to(device) for loss in state.get("losses", ())]
            # Earlier versions saved states after validations alone, without the number of the epoch.
            first = state.get("epoch", curve[-1].epoch if curve else 0) + 1
    saver = Saver(save)
    for epoch in range(first, training.epochs + 1):
        losses.append(training.epoch())
        if epoch in checks:
            confusions = {split: confusion_of(student, data, num_classes, device) for split, data in tests.items()}
            shares = {split: 100 * int(table.trace()) / int(table.sum()) for split, table in confusions.items()}
            loss = torch.stack(losses).mean().item()
            if not math.isfinite(loss):
                raise Diverged(f"student {name} diverged: its loss by epoch {epoch} is not finite; lower the protocol's lr")
            curve.append(Check(epoch, loss, shares["test"], shares.get("val")))
            losses = []
        if epoch < training.epochs:
            saver(
                epoch / training.epochs, epoch=epoch, training=training.state_dict(), losses=losses,
                curve=[astuple(check) for check in curve],
            )  # fmt: skip
    chosen = max(curve, key=lambda check: check.val or 0.0)
    return student, Accuracy(
        last=curve[-1].test, best=max(check.test for check in curve), val=chosen.test if "val" in tests else None,
        curve=curve, confusion=confusions["test"].int(),
    )  # fmt: skip


def soft_label_loss(logits: Tensor, teacher_logits: Tensor, temperature: float, reduction: str = "mean") -> Tensor:
    """KL(softmax(teacher / T) ‖ softmax(student / T)) without the factor T² (RDED): the mean over the batch, or with
    ``reduction="none"`` the value of each image, [B]."""
    wanted = (teacher_logits.float() / temperature).softmax(dim=1)
    predicted = (logits / temperature).log_softmax(dim=1)
    if reduction == "mean":
        return F.kl_div(predicted, wanted, reduction="batchmean")
    return F.kl_div(predicted, wanted, reduction="none").sum(dim=1)


def _optimizer(student: nn.Module, p: ProtocolConfig) -> torch.optim.Optimizer:
    if p.optimizer == "sgd":
        return torch.optim.SGD(student.parameters(), lr=p.lr, momentum=p.momentum, weight_decay=p.weight_decay)
    matrices = [parameter for parameter in student.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in student.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": p.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=p.lr, betas=(0.9, 0.999))


def decay_factor(kind: str, epoch: int, epochs: int) -> float:
    """Factor of the learning rate in the epoch with the number ``epoch``, which counts from 0."""
    if kind == "steps":
        return 0.2 ** sum(epoch >= milestone for milestone in (2 * epochs // 3, 5 * epochs // 6))
    if kind == "halfway":
        return 0.1 if epoch > epochs // 2 else 1.0
    return 0.5 * (1 + math.cos(math.pi * epoch / epochs / (2 if kind == "half_cosine" else 1)))
