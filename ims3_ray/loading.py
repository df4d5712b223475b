"""Reading a config: YAML with ``extends``, dotted overrides, one-line errors that name the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from ims3_ray.config import CompareConfig, EvaluateConfig, PretrainConfig, RunConfig, Section, SweepConfig, canonical, merge
from ims3_ray.errors import UserError, masked

Tree = TypeVar("Tree", bound=Section)


def load_config(tree: type[Tree], file: str | Path | Sequence[str] | None = None, overrides: Iterable[str] = ()) -> Tree:
    """Build ``tree`` from YAML files, each laid on the one before (or the defaults), and ``dotted.key=value`` overrides.

    Raises :class:`UserError` with one line for an unreadable file, an unknown key or an impossible value.
    """
    files: Sequence[str | Path] = [file] if isinstance(file, str | Path) else file or []
    values: dict[str, Any] = {}
    for each in files:
        values = merge(values, _read_yaml(Path(each), ()))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(f"override '{override}' is not of the form key=value, as in selection.alpha=0.4")
        _set(values, key.split("."), _parse(override, text))
    return build(tree, values)


def build(tree: type[Tree], values: Mapping[str, Any]) -> Tree:
    """``tree`` from nested mappings, merged over the defaults; errors as in :func:`load_config`."""
    merged = merge(_defaults(tree), values)
    merged |= {key: values[key] for key in WHOLE if key in values}
    merged = _without_removed(merged)
    try:
        return tree.model_validate(merged)
    except ValidationError as error:
        raise UserError(_one_line(tree, error)) from error


NAMED = ("arms", "evaluation.protocols", "sets")
"""Mappings of names that a config chooses: null removes one."""


WHOLE = ("space",)
"""What replaces the default as a whole."""


def as_yaml(config: Section) -> str:
    """What a config says otherwise than the defaults: :func:`load_config` makes the same of it."""
    changed = _changes(canonical(config), _defaults(type(config)))
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True)


def _changes(plain: Mapping[str, Any], default: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for key, value in plain.items():
        inner = default.get(key)
        if isinstance(value, dict) and isinstance(inner, dict):
            if found := _changes(value, inner, f"{prefix}{key}."):
                changed[key] = found
        elif key not in default or value != inner:
            changed[key] = value
    removed = [key for key in default if key not in plain] if prefix.removesuffix(".") in NAMED else []
    return changed | dict.fromkeys(removed)


def _without_removed(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    kept = {}
    for key, value in values.items():
        inner = _without_removed(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        if inner is not None or prefix.removesuffix(".") not in NAMED:
            kept[key] = inner
    return kept


def _defaults(tree: type[Section]) -> dict[str, Any]:
    return canonical(tree())


def _read_yaml(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if file.resolve() in seen:
        raise UserError(f"config '{file}' extends itself; remove the circle")
    try:
        values = yaml.safe_load(file.read_text()) or {}
    except OSError as error:
        raise UserError(f"config '{file}' cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"config '{file}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"config '{file}' must be a mapping of keys to values")
    parents = values.pop("extends", [])
    merged: dict[str, Any] = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        merged = merge(merged, _read_yaml(file.parent / parent, (*seen, file.resolve())))
    return merge(merged, values)


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        inner = values.get(part)
        values[part] = inner = dict(inner) if isinstance(inner, dict) else {}
        values = inner
    values[path[-1]] = value


def _parse(override: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}' has a value that is not YAML; quote it") from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a word
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _one_line(tree: type[Section], error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_keys(_defaults(tree)))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        parent = key.rpartition(".")[0]
        siblings = [k for k in known if k.rpartition(".")[0] == parent]
        near = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6) or near
        return f"unknown config key '{key}'; did you mean '{near[0]}'?"
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    value = first.get("input")
    shown = "" if isinstance(value, dict | BaseModel) else f"={value!r}"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return masked(f"config {key}{shown}: {message}{more}" if key else f"config: {message}{more}")


def _keys(values: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{key}.")


def reference() -> str:
    """``docs/configuration.md``: every key of every tree, its default and its meaning, from the classes themselves."""
    main = list(_rows(RunConfig(), ""))
    trees: tuple[tuple[str, str, list[str]], ...] = (
        ("distill", "", main),
        ("sweep", "The keys of jobs/distill.py, and these.", [row for row in _rows(SweepConfig(), "") if row not in main]),
        ("compare", "The keys of jobs/distill.py, and these.", [row for row in _rows(CompareConfig(), "") if row not in main]),
        (
            "evaluate",
            "Of the keys of jobs/distill.py `storage`, `data`, `actors`, `evaluation`, `tracking` and `cluster`, and these.",
            [row for row in _rows(EvaluateConfig(), "") if row not in main],
        ),
        ("pretrain", "", list(_rows(PretrainConfig(), ""))),
    )
    parts = [REFERENCE_HEAD]
    for job, note, rows in trees:
        parts += [
            f"## jobs/{job}.py",
            "",
            *([note, ""] if note else []),
            "| key | default | meaning |",
            "|---|---|---|",
            *rows,
            "",
        ]
    return "\n".join(parts)


def _rows(section: BaseModel, prefix: str) -> Iterable[str]:
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), prefix + name
        if isinstance(value, BaseModel):
            yield from _rows(value, f"{key}.")
        elif isinstance(value, dict) and value and all(isinstance(inner, Section) for inner in value.values()):
            names = ", ".join(f"`{inner}`" for inner in value)
            yield f"| `{key}.NAME` | {names} | {' '.join((field.description or '').split())} |"
            yield from _rows(_typical(next(iter(value.values()))), f"{key}.NAME.")
        else:
            shown = yaml.safe_dump(canonical(section)[name], default_flow_style=True, width=10**6).removesuffix("...\n").strip()
            yield f"| `{key}` | `{shown}` | {' '.join((field.description or '').split())} |"


def _typical(section: Section) -> Section:
    """One of its kind with the defaults, if everything has one."""
    try:
        return type(section)()
    except ValidationError:
        return section


REFERENCE_HEAD = """# Configuration

A config is YAML; what it does not say has the default. `extends: FILE` (or a list) lays it on other files, `key.key=value`
on the command line comes last, as in `python jobs/distill.py --config configs/demo.yaml selection.alpha=0.4`. A misspelt key
or an impossible value is an error of one line before anything starts. `--dry-run` shows the plan.

This page is written by `python -m ims3_ray.loading` from the classes in `ims3_ray/config/`.
"""


if __name__ == "__main__":
    print(reference(), end="")
