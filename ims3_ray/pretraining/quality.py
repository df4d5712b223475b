"""The quality of trained weights, and how often a classifier of real images assigns a generator's samples to the class for
which they were generated. Needs no Ray."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ims3_ray.config import DataConfig, PretrainConfig, ProtocolConfig
from ims3_ray.config.evaluation import for_ipc
from ims3_ray.engine.inputs import decoded_split
from ims3_ray.engine.shards import units_of
from ims3_ray.stages.adapters import Pretrained
from ims3_ray.stages.candidates import Candidates
from ims3_ray.training.accuracy import Labelled, accuracy_of, resident
from ims3_ray.training.students import train_student

SHOWN = 10
"""Number of samples of each class on the sheet."""
RECOGNISED = 0.8
"""Share of the judge's accuracy on real images below which samples are called worse than real images."""


class Splits(NamedTuple):
    """Training and test images (uint8 [N, C, size, size], labels [N]), and the names of the classes."""

    train: Labelled
    test: Labelled
    names: tuple[str, ...]
    broken: tuple[str, ...] = ()
    """Names of the images that cannot be decoded."""


def splits_of(data: DataConfig) -> Splits:
    """The decoded training and test split of a source."""
    (train, broken), (test, more) = decoded_split(data, "train"), decoded_split(data, "test")
    return Splits(train[:2], test[:2], train[2], (*broken, *more))


@dataclass(frozen=True)
class Quality:
    """How good trained weights are, in words and in figures."""

    lines: list[str]
    """Lines of text for the card and the terminal."""
    figures: dict[str, float] = field(default_factory=dict)
    """For a generator: the judge's accuracy on the test split (``judge_accuracy``), and the mean over classes of the share of
    samples that the judge assigns to their class (``agreement``), both in per cent. For an autoencoder: the peak
    signal-to-noise ratio of its reconstructions in dB (``psnr``)."""
    judged: bool = False
    """Whether the section `quality` of the config says how the figures were made."""
    broken: tuple[str, ...] = ()
    """Names of the images of both splits that cannot be decoded and were left out."""
    device: str = ""
    """Name of the device on which they were judged, which is one like that of the training."""
    samples: Tensor | None = None
    """For a generator: at most ten samples of each class, uint8 [N, C, H, W], in order of classes. For an autoencoder: test
    images, each followed by its reconstruction."""


def judge_name(judge: ProtocolConfig) -> str:
    """The judge's network, with its width if it is one that has any."""
    student = judge.students[0]
    return f"{student} of width {judge.width}" if student.startswith("convnet") else student


def judge_generator(
    config: PretrainConfig, weights: Path, splits: Splits, device: str, autoencoder: Path | None = None
) -> Quality:  # fmt: skip
    """How often a judge, a classifier trained on the real training split, assigns guided samples to the class for which they
    were generated. If the config wants no judge, there are only samples. ``autoencoder`` is that of a generator of latents."""
    q, (train, test, names) = config.quality, splits[:3]
    torch.set_num_threads(q.threads)
    produce = Candidates(q.sampling, Pretrained.of_file(weights), None, autoencoder, config.seed, device)
    count = q.images_per_class if q.judge is not None else SHOWN
    units = [units_of(label, count, q.sampling.unit_size) for label in range(len(names))]
    samples = [torch.cat([produce(unit).pixels.cpu() for unit in of_class])[:count] for of_class in units]
    shown = torch.cat([of_class[:SHOWN] for of_class in samples])
    if q.judge is None:
        return Quality(["no judge has looked at the samples (quality.judge=null)"], judged=True, samples=shown)
    judge = q.judge.students[0]
    size = q.judge.size or train[0].shape[-1]
    tested = resident(test[0], size, q.judge.test_crop), test[1]
    student, accuracy = train_student(judge, train, tested, len(names), q.judge, 0, device=device)
    agreed = [
        accuracy_of(student, (resident(of_class, size), torch.full((len(of_class),), label)), len(names), device)
        for label, of_class in enumerate(samples)
    ]
    epochs = for_ipc(q.judge.epochs, -(-len(train[0]) // len(names)))
    s, agreement = q.sampling, sum(agreed) / len(agreed)
    lines = [
        f"judge: {judge_name(q.judge)}, {epochs} epochs on the real training split, {accuracy.last:.1f} % on the test split",
        f"the judge names {agreement:.1f} % of {count} guided samples a class as they were "
        f"asked for ({s.sampler}, {s.steps} steps, guidance {s.cfg_scale:g}); chance is {100 / len(names):.1f} %",
        "by class: " + ", ".join(f"{name} {share:.0f} %" for name, share in zip(names, agreed, strict=True)),
    ]
    if agreement < RECOGNISED * accuracy.last:
        lines.append(
            f"sets of these samples will train worse classifiers than as many real images: the judge names {agreement:.0f} % "
            f"of the samples and {accuracy.last:.0f} % of real images correctly; train longer (generator.minutes or "
            "generator.steps), or use arms without a generator (configs/methods/alone.yaml)"
        )
    return Quality(lines, {"judge_accuracy": accuracy.last, "agreement": agreement}, judged=True, samples=shown)
