"""Weights and data sets by their id on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from ims3_ray.errors import UserError

FILES = (".safetensors", ".pt", ".pth", ".bin")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_id(reference: str) -> bool:
    """Whether ``reference`` reads like ``org/name`` rather than like a file."""
    return HUB_ID.fullmatch(reference) is not None and Path(reference).suffix not in FILES


def fetch(reference: str, patterns: list[str], what: str, kind: Literal["model", "dataset"] = "model") -> Path:
    """The folder of the hub's cache that holds the files of ``reference`` that match ``patterns``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(reference, repo_type=kind, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{what} '{reference}' is neither a file or folder nor to be had from the hub "
            f"({type(error).__name__}); check the name and HF_ENDPOINT, HF_TOKEN"
        ) from error
