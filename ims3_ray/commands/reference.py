"""The reference of all keys: ``docs/configuration.md``, and what the command line shows of them.

    python -m ims3_ray.commands.reference > docs/configuration.md

writes the page, and in ``ims3_ray/config/`` ``known_keys.json`` and ``described_keys.json``, from which a command checks keys
and prints its help without importing the classes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ims3_ray.commands.table import COMMANDS, named
from ims3_ray.config import CompareConfig, EvaluateConfig, PretrainConfig, RunConfig, Section, SweepConfig, keys
from ims3_ray.config.keys import DESCRIBED_KEYS, KNOWN_KEYS
from ims3_ray.config.rows import key_tree, options_of
from ims3_ray.report.markdown import table


def trees() -> tuple[type[Section], ...]:
    """The config classes of all commands, that of ``ims3 distill`` first."""
    return tuple(named(command.tree) for command in COMMANDS.values() if command.tree is not None)


def reference() -> str:
    """The text of ``docs/configuration.md``: every key of every config class, its default and its meaning."""
    main = options_of(RunConfig)
    these = "The keys of `ims3 distill`, and these."
    parts: tuple[tuple[str, str, type[Section]], ...] = (
        ("distill", "", RunConfig),
        ("sweep", these, SweepConfig),
        ("compare", these, CompareConfig),
        (
            "evaluate",
            "Of the keys of `ims3 distill` `storage`, `data`, `actors`, `evaluation`, `tracking` and `cluster`, and these.",
            EvaluateConfig,
        ),
        ("pretrain", "", PretrainConfig),
        *((name, "", named(COMMANDS[name].tree)) for name in ("convert", "pack", "artifacts", "push")),
    )
    lines = [REFERENCE_HEAD]
    for command, note, tree in parts:
        rows = main if tree is RunConfig else [row for row in options_of(tree) if not note or row not in main]
        lines += [f"## ims3 {command}", "", *([note, ""] if note else [])]
        lines += table(
            ["key", "default", "meaning"], ([f"`{key}`", _cell(key, default), meaning] for key, default, meaning in rows)
        )
        lines += [""]
    return "\n".join(lines)


def _cell(key: str, default: str) -> str:
    """A default in the table: code, or several pieces of it where it is a list of names."""
    return ", ".join(f"`{name}`" for name in default.split(", ")) if key.endswith(".NAME") else f"`{default}`"


REFERENCE_HEAD = """# Configuration

A config is YAML; what it does not say has the default. `extends: FILE` (or a list) lays it on other files, `key.key=value`
on the command line comes last, as in `ims3 distill --config demo selection.alpha=0.4`. A misspelt key
or an impossible value is an error of one line before anything starts. `--dry-run` shows the plan.

This page is written by `python -m ims3_ray.commands.reference` from the classes in `ims3_ray/config/`.
"""


def known_keys() -> str:
    """The text of ``known_keys.json``: the tree of keys of each config class, by the name of the class."""
    return json.dumps({tree.__name__: key_tree(tree()) for tree in trees()}, indent=0, sort_keys=True) + "\n"


def described_keys() -> str:
    """The text of ``described_keys.json``: :func:`options_of` of each config class. A class has only those that the
    first class lacks, and the numbers of those that it shares with it."""
    first, *_ = every = trees()
    main = options_of(first)
    found: dict[str, list[Any]] = {}
    for tree in every:
        rows = options_of(tree)
        found[tree.__name__] = [main.index(row) if tree is not first and row in main else row for row in rows]
    return json.dumps(found, indent=0, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for file, text in ((KNOWN_KEYS, known_keys()), (DESCRIBED_KEYS, described_keys())):
        Path(keys.__file__).with_name(file).write_text(text, "utf-8")
    print(reference(), end="")
