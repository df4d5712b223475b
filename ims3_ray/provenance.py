"""Where results come from: versions of the program and its libraries, hardware, command, and hashes of data and weights."""

from __future__ import annotations

import platform
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


def described(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What :func:`provenance` gave, as (name, text) pairs for a person. Of the path of weights only the last part is shown."""
    commit = f", commit {found['commit']}" if found["commit"] else ""
    rows = [
        ("program", f"ims3-ray {found['version']}{commit}"),
        *([("command", found["command"])] if found["command"] else []),
        ("libraries", ", ".join(f"{name} {number}" for name, number in found["libraries"].items())),
        ("hardware", "; ".join(found["hardware"])),
        *((f"{split} images", f"fingerprint {digest}") for split, digest in found["data"].items()),
    ]
    for key, digest in found["weights"].items():
        name, _, reference = key.partition(" ")
        rows.append((name, f"{reference.rpartition('/')[2]}, digest {digest}"))
    return rows
