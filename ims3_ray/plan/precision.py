"""Decides the number formats that a config leaves open (``precision: auto``), before anything is planned.

The decision is part of the keys of artifacts, since pixels differ with it by about one grey value. It is therefore made once: a
command that continues a run takes what the run began with, also on another machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from ims3_ray.config import RunConfig, canonical
from ims3_ray.engine.folder import stored_config
from ims3_ray.io.storage import Storage
from ims3_ray.training.precision import precision_on

C = TypeVar("C", bound=RunConfig)
AUTO: Literal["auto"] = "auto"


def decided(config: C) -> C:
    """The config with bf16 or fp32 in place of ``auto`` in ``sampling``, ``finetune`` and ``adopt``, also in the overrides of
    arms.

    It is bf16 if GPUs do the work, and on CPUs if that of this machine computes bf16 natively.
    """
    overrides = (part for arm in config.arms.values() for part in arm.overrides.values() if isinstance(part, dict))
    named = [config.sampling.precision, config.finetune.precision, *(part.get("precision") for part in overrides)]
    if AUTO not in [*named, config.adopt.precision if config.adopt is not None else None]:
        return config
    plain = canonical(config)
    stored = stored_config(Storage.at(config.storage), config.name, "its images stay in artifacts/") or {}
    before = _holders(stored)
    gpus = {"sampling": config.actors.gpus, "finetune": config.finetune.trainer.gpus_per_worker}
    gpus["adopt"] = config.adopt.trainer.gpus_per_worker if config.adopt is not None else 0
    for place, holder in _holders(plain).items():
        if holder.get("precision") == AUTO:
            here = precision_on(AUTO, "cuda" if gpus[place[-1]] else "cpu")
            holder["precision"] = before.get(place, {}).get("precision", here)
    return type(config).model_validate(plain)


def _holders(plain: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Place of every section of a plain config that names a precision of the generator → the section."""
    found = {}
    places: dict[tuple[str, ...], Mapping[str, Any]] = {(): plain}
    places |= {("arms", name): arm.get("overrides") or {} for name, arm in (plain.get("arms") or {}).items() if arm}
    for place, holder in places.items():
        for section in ("sampling", "finetune", "adopt"):
            if isinstance(values := holder.get(section), dict):
                found[*place, section] = values
    return found
