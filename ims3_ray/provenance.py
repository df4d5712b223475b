"""Where results come from: versions of the program and its libraries, hardware, command, and hashes of data and weights."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
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


def command(private: Iterable[str] = ()) -> str:
    """The command line of this process. Arguments whose key begins with one of ``private`` are left out, with their values;
    of config files only the names are given."""
    script, *arguments = sys.argv or [""]
    kept = [argument for argument in arguments if not argument.startswith(tuple(private))]
    for number, argument in enumerate(kept):
        if number and kept[number - 1] == "--config":
            kept[number] = Path(argument).name
        elif argument.startswith("--config="):
            kept[number] = f"--config={Path(argument.removeprefix('--config=')).name}"
    try:
        script = str(Path(script).resolve().relative_to(Path(__file__).resolve().parents[1]))
    except ValueError:
        script = Path(script).name
    return shlex.join([script, *kept])


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
        ("command", found["command"]),
        ("libraries", ", ".join(f"{name} {number}" for name, number in found["libraries"].items())),
        ("hardware", "; ".join(found["hardware"])),
        *((f"{split} images", f"fingerprint {digest}") for split, digest in found["data"].items()),
    ]
    for key, digest in found["weights"].items():
        name, _, reference = key.partition(" ")
        rows.append((name, f"{reference.rpartition('/')[2]}, digest {digest}"))
    return rows
