"""Where results come from: versions of the program and its libraries, hardware, command, and hashes of data and weights."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "torchvision",
    "ray",
    "diffusers",
    "timm",
    "deepspeed",
    "mlflow",
    "pyarrow",
    "pydantic",
    "numpy",
    "pillow",
)
"""Libraries whose versions can change results."""


@cache
def version() -> str:
    """Version of this program."""
    try:
        return metadata.version("ims3-ray")
    except metadata.PackageNotFoundError:  # a source tree that is not installed
        return "unknown"


@cache
def commit() -> str | None:
    """Git commit of the source tree that runs, with ``+`` if files of it are changed; None if it is no git checkout."""
    folder = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            found = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            return None
        return found.stdout.strip()

    if git("ls-files", "--error-unmatch", "ims3_ray/provenance.py") is None:  # an installed copy inside another repository
        return None
    head, changed = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{head}{'+' if changed else ''}" if head else None


@cache
def libraries() -> dict[str, str]:
    """Versions of Python and of those of :data:`LIBRARIES` that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


PRIVATE = ("storage", "tracking", "cluster")
"""Sections of the config that say where a run was computed. They are private: dataset cards leave them out."""
PLACE = re.compile(r"(?:(?<![\w.~])(?:~|\.{1,2})?/|\b[a-z][a-z0-9+.-]*://)[^\s,'\"\]}]+")
"""A path on a disk, or an address, within a text. Names of the hub (``user/name``) are neither."""

_command: tuple[str, ...] = ()
"""Words of the command that runs, as :func:`record_command` was told; empty if the program is used from Python."""


def record_command(words: Iterable[str]) -> None:
    """Remember the command that runs: its program, the names of its configs, and its overrides."""
    global _command
    _command = tuple(words)


def recorded_command() -> tuple[str, ...]:
    """What :func:`record_command` was told."""
    return _command


def command(private: Iterable[str] = ()) -> str:
    """The command that runs, without overrides whose key begins with one of ``private``; empty if the program is used from
    Python, since the arguments of another program are none of its business."""
    return shlex.join(word for word in _command if not word.startswith(tuple(private)))


def provenance(
    data: Mapping[str, str], weights: Mapping[str, str], machines: Iterable[Mapping[str, Any]], private: Iterable[str] = ()
) -> dict[str, Any]:
    """All of it as plain values. ``data`` maps splits to fingerprints, ``weights`` models to digests; ``machines`` describe the
    hardware that made the images, as their notes record it."""
    devices = sorted({f"{machine['device']} with torch {machine['torch']}" for machine in machines})
    return {
        "version": version(), "commit": commit(), "command": command(private), "libraries": libraries(),
        "hardware": devices, "data": dict(data), "weights": dict(weights),
    }  # fmt: skip


def without_places(value: Any) -> Any:
    """Values of a config with only the last part of every path on a disk and of every address: what is published does not say
    where its maker keeps things."""
    if isinstance(value, Mapping):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(item) for item in value]
    if not isinstance(value, str):
        return value
    return last_part(value) if PLACE.match(value) else PLACE.sub(lambda found: last_part(found[0]), value)


def _without_places(command: str) -> str:
    """The same for the words of a command, of which many are ``key=value``."""
    words = (word.partition("=") for word in shlex.split(command))
    return shlex.join("".join(without_places(part) for part in word) for word in words)


def last_part(place: str) -> str:
    """The name at the end of a path or an address."""
    return place.rstrip("/").rpartition("/")[2]


def described(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What :func:`provenance` gave, as (name, text) pairs for a person, of paths only the last part."""
    commit = f", commit {found['commit']}" if found["commit"] else ""
    rows = [
        ("program", f"ims3-ray {found['version']}{commit}"),
        *([("command", _without_places(found["command"]))] if found["command"] else []),
        ("libraries", ", ".join(f"{name} {number}" for name, number in found["libraries"].items())),
        ("hardware", "; ".join(found["hardware"])),
        *((f"{split} images", f"fingerprint {digest}") for split, digest in found["data"].items()),
    ]
    for key, digest in found["weights"].items():
        name, _, reference = key.partition(" ")
        rows.append((name, f"{last_part(reference)}, digest {digest}"))
    return rows
