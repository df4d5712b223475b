"""The folder of a run: checks that it belongs to this config, and warns if it would be lost with the job."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from ims3_ray.component import without_unknown_components
from ims3_ray.config import Section, WorkConfig, canonical
from ims3_ray.config.files import with_moved_keys
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage


def check_folder(config: WorkConfig, storage: Storage) -> None:
    """Raises :class:`UserError` if the run folder holds a run with another config. Options that only say where and how fast
    it runs are not compared."""
    kept = "its images stay in artifacts/, and the same command makes it again"
    if (stored := stored_config(storage, config.name, kept)) is not None:
        mine, theirs = (_what_matters(completed(config, plain)) for plain in (canonical(config), stored))
        check_same(storage, config.name, theirs, mine)


def stored_config(storage: Storage, name: str, kept: str) -> dict[str, Any] | None:
    """The config that a run has written to its folder; None if there is none. Raises :class:`UserError` if it cannot be read;
    ``kept`` says what is not lost with the folder."""
    path = f"{name}/config.yaml"
    if not storage.exists(path):
        return None
    try:
        stored = yaml.safe_load(storage.read(path))
    except (yaml.YAMLError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        raise UserError(
            f"'{storage.address(path)}' is damaged, so it is not known whether the run folder is that of this config; delete "
            f"the folder '{storage.address(name)}' ({kept})"
        )
    return stored


def completed(config: Section, stored: dict[str, Any]) -> dict[str, Any]:
    """A stored config, completed at any depth with the defaults of options that did not exist when it was written."""
    plain = without_unknown_components(type(config), with_moved_keys(stored))
    try:
        return canonical(type(config).model_validate(plain))
    except ValidationError:  # it has options that no longer exist: they count as differences
        return plain


def check_same(storage: Storage, name: str, theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raises :class:`UserError`, with the first difference, if the config of a run folder is not the one of this command."""
    if theirs != mine:
        key, old, new = first_difference(theirs, mine)
        raise UserError(
            f"run folder '{storage.address(name)}' holds another config ({key}: {old!r} there, {new!r} here); "
            f"choose another name (name={name}-2) or delete the folder"
        )


DETAILS = {
    "pool": ("mix_hardware",),
    "search": ("concurrent",),
    "evaluation": ("cpus_per_task", "gpus_per_task", "threads_per_task"),
}
"""Section → its options that only say where and how fast a run executes."""


def _what_matters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config without the options that may change between two commands that continue the same run."""
    # Each command may score other sets, and one that goes on may have other limits of quality.
    left_out = ("storage", "cluster", "actors", "tracking", "plugins", "sets", "quality")
    kept = {key: copy.deepcopy(value) for key, value in plain.items() if key not in left_out}
    for section, details in DETAILS.items():
        kept[section] = {key: value for key, value in plain.get(section, {}).items() if key not in details}
    arms = kept.get("arms") or {}
    for holder in (kept, *(arm.get("overrides") for arm in arms.values())):
        for section in ("finetune", "adopt"):
            if isinstance(holder, dict) and isinstance(tuning := holder.get(section), dict):
                tuning.pop("trainer", None)  # how many workers train, and workers come and go
    teacher = kept.get("evaluation", {}).get("teacher")
    if isinstance(teacher, dict) and isinstance(trainer := teacher.get("trainer"), dict):
        # The number of workers matters for a teacher, each of which augments and normalises its own part of a batch.
        teacher["trainer"] = {key: trainer.get(key) for key in ("num_workers", "max_workers")}
    return kept


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> tuple[str, Any, Any]:
    """(dotted key, old value, new value) of the first place where two trees differ."""
    for key in [*new, *(k for k in old if k not in new)]:
        a, b = old.get(key), new.get(key)
        if a != b:
            if isinstance(a, Mapping) and isinstance(b, Mapping):
                return first_difference(a, b, f"{prefix}{key}.")
            return prefix + key, a, b
    raise ValueError("the trees do not differ")


def warn_if_lost_with_job(config: WorkConfig) -> None:
    if "://" not in config.storage and not os.path.isabs(config.storage) and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        print(
            f"warning: storage '{config.storage}' is relative, so results stay in the job's temporary folder on the head node; "
            "give storage=/absolute/path or s3://…",
            flush=True,
        )
