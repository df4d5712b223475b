"""Reads the YAML files, with ``extends``, and the overrides that a user writes. Code that uses the values is not imported."""

from __future__ import annotations

import copy
import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ims3_ray.config.base import ALTERNATIVES, is_given, merge
from ims3_ray.config.written import Loader, Written, read_override, typed
from ims3_ray.errors import UserError

CONFIGS = Path(__file__).parents[1] / "configs"
"""The configs that come with the package; in a checkout a link to the folder ``configs``."""


PARTS = ("kuberay",)
"""Folders beside the configs whose YAML files are for other programs."""


def config_names() -> list[str]:
    """Names of the configs that come with the package, such as ``demo`` and ``compare/cifar10``."""
    files = (file.relative_to(CONFIGS) for file in CONFIGS.rglob("*.yaml"))
    return sorted(str(file.with_suffix("")) for file in files if file.parts[0] not in PARTS)


def config_path(name: str | Path) -> Path:
    """The file that ``name`` is the path of, or that comes with the package under this name. Raises :class:`UserError` with
    the nearest name for one that does not exist."""
    path = Path(name)
    if path.is_file():
        return path
    known = config_names()
    if (named := str(name).removesuffix(".yaml").removeprefix("configs/")) in known:
        return CONFIGS / f"{named}.yaml"
    if path.exists():
        return path  # reading it says what is wrong with it
    near = difflib.get_close_matches(named, known, n=1)
    meant = f"; did you mean '{near[0]}'?" if near else "; ims3 configs lists those that come with the package"
    raise UserError(f"config '{name}' cannot be read: there is no such file{meant}")


def read_values(file: str | Path | Sequence[str] | None = None, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """The values of YAML files and of ``dotted.key=value`` overrides as nested mappings, each merged over those before it. What
    YAML does not read as text is a :class:`~ims3_ray.config.written.Written`.

    Raises :class:`UserError` with one line for an unreadable file, a malformed override or a key that has moved.
    """
    files: Sequence[str | Path] = [file] if isinstance(file, str | Path) else file or []
    values: dict[str, Any] = {}
    for each in files:
        values = merge(values, _read_yaml(config_path(each), ()))
    return with_overrides(values, overrides)


def with_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """The values with overrides of the form ``dotted.key=value``. Raises the errors of :func:`read_values`."""
    found, overrides = dict(values), list(overrides)
    named = {override.partition("=")[0] for override in overrides}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}' is not of the form key=value, as in selection.alpha=0.4")
        value = read_override(override, text)
        _set(found, key.split("."), value, override)
        if is_given(value):
            for other in alternatives_to(key):
                if other not in named and is_given(_get(found, other.split("."))):
                    _set(found, other.split("."), None, override)
        arguments = f"{key}_args"  # of the network that the files name
        is_network = key.rpartition(".")[2] == "model" and _get(found, arguments.split("."))
        if is_network and not any(name.startswith(arguments) for name in named):
            _set(found, arguments.split("."), {}, override)
    check_moved(found)
    return found


MOVED = {
    "refine": "synthesis.cao2", "arms.*.refine": "arms.NAME.synthesise=cao2",
    "arms.*.overrides.refine": "arms.NAME.overrides.synthesis.cao2",
    "evaluation.protocols.*.unmixed_pass": "evaluation.protocols.NAME.second_pass (both passes are of the mixed batch)",
    "generator.warmup_steps": "generator.warmup, a share of the training such as 0.05",
    "generator.cooldown_steps": "generator.cooldown, a share of the training such as 0.25",
}  # fmt: skip
"""Keys that have moved (``*`` is any name) → what to write instead."""


def check_moved(values: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in values.items():
        path = f"{prefix}{key}"
        for old, new in MOVED.items():
            if fnmatch.fnmatchcase(path, old) and path.count(".") == old.count("."):
                raise UserError(f"config key '{path}' has moved: write {new}")
        if isinstance(value, Mapping):
            check_moved(value, f"{path}.")


def with_moved_keys(plain: Mapping[str, Any]) -> dict[str, Any]:
    """A config that an older version has stored, with the keys of :data:`MOVED` at their new places."""
    found = copy.deepcopy(dict(plain))
    _move_refine(found)
    for arm in found.get("arms", {}).values():
        if arm.pop("refine", False):
            arm["synthesise"] = "cao2"
        _move_refine(arm.get("overrides", {}))
    return found


def _move_refine(section: dict[str, Any]) -> None:
    if "refine" in section:
        section["synthesis"] = {**section.get("synthesis", {}), "cao2": section.pop("refine")}


def read_runs(file: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A file that describes several runs: its other values, and the values of each run under ``runs``, which may extend files
    of its own. Raises the errors of :func:`read_values`."""
    values = _parsed(file)
    runs = values.pop("runs", None)
    if not isinstance(runs, dict) or not all(isinstance(run, dict) for run in runs.values()):
        raise UserError(f"config '{file}' names no runs: it needs a mapping 'runs' of names to configs")
    return values, {name: _over_parents(run, file, (file.resolve(),)) for name, run in runs.items()}


def _read_yaml(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if file.resolve() in seen:
        raise UserError(f"config '{file}' extends itself; remove the circle")
    values = _parsed(file)
    if isinstance(values.get("runs"), dict):
        raise UserError(f"config '{file}' describes several runs; ims3 reproduce {file.stem} makes them")
    return _over_parents(values, file, (*seen, file.resolve()))


def _over_parents(values: dict[str, Any], file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The values, merged over those of the files that they extend; ``file`` is where they stand."""
    parents = typed(str | list[str], values.pop("extends", []))
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        beside = file.parent / parent
        merged = merge(merged, _read_yaml(beside if beside.is_file() else config_path(parent), seen))
    return merge(merged, values)


def _parsed(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty one for an empty file."""
    try:
        values = yaml.load(file.read_text("utf-8"), Loader) or {}
    except UserError as error:
        raise UserError(f"config '{file}', {error}") from error
    except OSError as error:
        raise UserError(f"config '{file}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"config '{file}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"config '{file}' is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(values, Written) and values.value is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"config '{file}' must be a mapping of keys to values")
    return values


def alternatives_to(key: str) -> list[str]:
    """The keys of the same section that say the same in another way: see :data:`ALTERNATIVES`."""
    section, dot, name = key.rpartition(".")
    return [f"{section}{dot}{other}" for other in ALTERNATIVES if other != name] if name in ALTERNATIVES else []


def _get(values: Mapping[str, Any], path: list[str]) -> Any:
    """The value at a path; None if there is none."""
    found: Any = values
    for part in path:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _set(values: dict[str, Any], path: list[str], value: Any, override: str) -> None:
    """Set what ``override`` says. A mapping is merged over the one that is there; an empty one takes its place."""
    for number, part in enumerate(path[:-1]):
        inner = values.get(part)
        if is_given(inner) and not isinstance(inner, dict):
            raise UserError(
                f"override '{override}' needs a mapping at '{'.'.join(path[: number + 1])}', which has a single value"
            )
        values[part] = inner = dict(inner) if isinstance(inner, dict) else {}
        values = inner
    if isinstance(value, Written) and not is_given(value) and path[-1] not in values:
        value = replace(value, nothing_there=True)
    values[path[-1]] = merge(values, {path[-1]: value})[path[-1]] if value != {} else value
