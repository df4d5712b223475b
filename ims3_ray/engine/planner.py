"""Collects the stages that a command needs, and merges equal ones."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeVar

from ims3_ray.config import RunConfig, WorkConfig
from ims3_ray.engine.inputs import Data, Models
from ims3_ray.engine.stage import Stage

S = TypeVar("S", bound=Stage)


class Planner:
    """Argument of the ``plan`` methods of stages: holds the opened data and weights, and the stages planned so far."""

    def __init__(self, config: WorkConfig, images_per_class: int = 1) -> None:
        """Open the data. Every class must have ``images_per_class`` training images. Raises :class:`UserError`."""
        self.work, self.data = config, Data(config, images_per_class)
        self.classes = self.data.classes
        self._stages: dict[tuple[Any, ...], Stage] = {}
        self._models: dict[tuple[str | None, ...], Models] = {}

    @property
    def stages(self) -> list[Stage]:
        """All stages planned so far, in the order in which they were added."""
        return list(self._stages.values())

    def add(self, stage: S) -> S:
        """Add ``stage`` and return it, or return the equal stage that was added before, widened to the units of both. Equal
        stages have the same name, parameters and inputs."""
        inputs = tuple(sorted((name, id(other)) for name, other in stage.inputs.items()))
        found = self._stages.setdefault((stage.name, json.dumps(stage.params, sort_keys=True, default=list), inputs), stage)
        assert isinstance(found, type(stage))
        found.widen(stage.units)
        return found

    def models(self, config: RunConfig) -> Models:
        """The weights that an arm's config names; each is opened on first access."""
        names = (
            config.generator, config.autoencoder, config.encoder, str(config.data.size), config.pool.store,
            str(config.sampling.clip), config.sampling.negative_prompt, str(config.sampling.cfg_scale > 1),
            str(config.finetune.label_dropout > 0),
        )  # fmt: skip
        if names not in self._models:
            self._models[names] = Models(config, self.classes)
        return self._models[names]

    def class_units(self) -> tuple[str, ...]:
        """Names of units, one per class, by the class's position in the distilled set."""
        return class_units(len(self.classes.names))


@cache
def class_units(count: int) -> tuple[str, ...]:
    """Names of the units of a set of ``count`` classes."""
    return tuple(f"class-{position:04d}" for position in range(count))


def pixel_bytes(images: int, config: WorkConfig) -> float:
    """Bytes of ``images`` decoded images."""
    return float(images * config.data.channels * config.data.size**2)


PNG_SHARE = 0.6
"""Size of a photograph as PNG, as a share of the size of its raw pixels."""
