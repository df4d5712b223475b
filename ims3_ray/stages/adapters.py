"""What fine-tuning stores for each class group, and the generator with the adapter of a class's group merged into it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import nn

from ims3_ray.diffusion.prediction import Predictor
from ims3_ray.engine.shards import commit_units
from ims3_ray.engine.stage import Stage
from ims3_ray.engine.weights import Weights
from ims3_ray.errors import Damaged
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage
from ims3_ray.models.generator import generator_path, open_generator
from ims3_ray.models.generators.base import Generator


def group_unit(group: int) -> str:
    """Name of a class group in the stage's manifest."""
    return f"group-{group}"


def adapter_stem(unit: str) -> str:
    """Name, without its ending, of the shard that holds the adapter of the group ``unit``."""
    return unit.replace("group", "adapter")


def group_checkpoints(group: int) -> str:
    """Folder of the artifact that holds a class group's checkpoints until the group is committed."""
    return f"train-{group}"


@dataclass(frozen=True)
class Adapters:
    """The committed groups of a fine-tuning. Group G has the files ``adapter-G.safetensors`` and ``losses-G.json``."""

    artifact: Artifact
    groups: list[list[int]]
    """The generator's labels of the classes in each group."""

    @classmethod
    def of(cls, finetune: Stage, storage: Storage) -> Adapters:
        return cls(finetune.artifact(storage), finetune.params["groups"])

    def group_of(self, label: int) -> int:
        return next(number for number, labels in enumerate(self.groups) if label in labels)

    def losses(self, group: int) -> list[dict[str, float]]:
        """The losses of a group, one row per step; none if the file is lost, which is no reason to train again."""
        name = f"losses-{group}.json"
        try:
            rows: list[dict[str, float]] = json.loads(self.artifact.read(name))
        except (Damaged, ValueError):
            print(f"note: {self.artifact.address}/shards/{name} is missing or damaged; its losses are not shown", flush=True)
            return []
        return rows

    def commit(self, group: int, outcome: dict[str, Any], images: int, seconds: float) -> None:
        """Write what :func:`~ims3_ray.stages.finetune_worker.finetune_loop` returned, commit the group and delete its
        checkpoints. A group that another job has committed meanwhile stays as it is."""
        if self.made_meanwhile(group):
            return
        digest = self.artifact.write(f"adapter-{group}.safetensors", outcome["adapter"])
        self.artifact.write(f"losses-{group}.json", json.dumps(outcome["history"]).encode())
        commit_units(self.artifact, {group_unit(group): {"sha256": digest, "images": images}}, seconds)
        self.artifact.storage.delete(f"{self.artifact.folder}/{group_checkpoints(group)}")

    def made_meanwhile(self, group: int) -> bool:
        """Whether another job has committed the group since this process last looked."""
        self.artifact.look_again()
        return group_unit(group) in self.artifact.units

    def merge(self, group: int, generator: Generator, network: nn.Module) -> None:
        """Merge a group's adapter into the pretrained ``network``."""
        generator.merge(network, load(self.artifact.read(f"adapter-{group}.safetensors", group_unit(group))))


@dataclass(frozen=True)
class Pretrained:
    """A generator before its fine-tuning: weights, and the classes that it was taught in addition, if any."""

    weights: Weights
    added: tuple[str, ...] = ()
    """Names of the classes that the weights do not know."""
    adopted: Adapters | None = None
    """What the generator has learnt of them; None while it learns."""
    like: Mapping[str, str] | None = None
    """Added class → known class from which it starts to learn."""
    told: Mapping[str, Any] | None = None
    """What a generator that takes words is told: arguments of :meth:`Generator.told`."""

    @classmethod
    def of_file(cls, path: Path) -> Pretrained:
        """The generator of a weights file alone."""
        return cls(Weights.of(generator_path, str(path)))

    @classmethod
    def of(cls, stage: Stage, storage: Storage) -> Pretrained:
        """The generator among the weights of a stage, with the classes that its input ``adopt`` has taught it."""
        adopt = stage.inputs.get("adopt")
        if adopt is None:
            return cls(stage.weights["generator"], told=stage.params.get("told"))
        return cls(stage.weights["generator"], tuple(adopt.params["added"]), Adapters.of(adopt, storage))

    @property
    def adopted_hash(self) -> str:
        """SHA-256 of the adapter of the added classes."""
        assert self.adopted is not None
        return str(self.adopted.artifact.units[group_unit(0)]["sha256"])

    def open(self) -> Generator:
        """The description of the generator, with all its classes."""
        generator = open_generator(self.weights.path())
        if self.told is not None:
            generator = generator.told(**self.told)
        return generator.adopting(self.added, self.like) if self.added else generator

    def load(self, generator: Generator) -> nn.Module:
        """The network of :meth:`open`'s ``generator``, float32 on the CPU, in evaluation mode."""
        network = generator.load()
        if self.adopted is not None:
            self.adopted.merge(0, generator, network)
        return network


class GroupModels:
    """Loads the network of a class: the pretrained generator, or the one fine-tuned for the class's group.

    It keeps one network at a time, since classes are asked for in order.
    """

    def __init__(
        self, pretrained: Pretrained, adapters: Adapters | None, device: str, dtype: torch.dtype = torch.float32,
        compiled: bool = False,
    ) -> None:  # fmt: skip
        self.pretrained, self.generator, self.adapters, self.device = pretrained, pretrained.open(), adapters, device
        self.dtype, self.compiled = dtype, compiled
        self.held: tuple[int | None, nn.Module] | None = None

    def of_class(self, label: int) -> nn.Module:
        """The network of a class."""
        group = self.adapters.group_of(label) if self.adapters else None
        if self.held is None or self.held[0] != group:
            self.held = None  # frees its memory before the next network is loaded
            network = self.pretrained.load(self.generator)
            if self.adapters and group is not None:
                self.adapters.merge(group, self.generator, network)
            network.to(self.device, self.dtype)
            if self.compiled:
                for block in self.generator.repeated(network):
                    block.compile(dynamic=False)
            self.held = (group, network)
        return self.held[1]

    def predictor(
        self, label: int, count: int = 1, cfg_scale: float = 1.0, cfg_channels: int | None = None,
        *, cfg_interval: tuple[float, float] = (0.0, 1.0), variance: bool = False,
        words: Sequence[str] | None = None,
    ) -> Predictor:  # fmt: skip
        """The predictor of ε of a class, as :meth:`ims3_ray.models.generators.base.Generator.predictor` describes it."""
        return self.generator.predictor(
            self.of_class(label), label, count, cfg_scale, cfg_channels, cfg_interval=cfg_interval, variance=variance,
            words=words,
        )  # fmt: skip
