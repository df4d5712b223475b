"""Weights and data sets by their id on the Hugging Face hub: downloaded, and uploaded."""

from __future__ import annotations

import fnmatch
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ims3_ray.errors import UserError, first_line

FILES = (".safetensors", ".pt", ".pth", ".bin")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
Kind = Literal["model", "dataset"]
"""Kinds of repositories."""


def is_hub_id(reference: str) -> bool:
    """Whether ``reference`` reads like ``org/name`` rather than like a file, and can be one."""
    return HUB_ID.fullmatch(reference) is not None and Path(reference).suffix not in FILES and _is_valid(reference)


def _is_valid(name: str) -> bool:
    """Whether a repository of the hub can have this name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def fetch(reference: str, patterns: list[str], what: str, kind: Kind = "model") -> Path:
    """The folder of the hub's cache that holds the files of ``reference`` that match ``patterns``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    _bars_on_terminals_only()
    try:
        return Path(snapshot_download(reference, repo_type=kind, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"{what} '{reference}' is neither a file or folder nor to be had from the hub "
            f"({type(error).__name__}); check the name and HF_ENDPOINT, HF_TOKEN"
        ) from error


def check_repository(name: str) -> None:
    """Raises :class:`UserError` unless ``name`` can be that of a repository."""
    if not _is_valid(name):
        raise UserError(f"'{name}' cannot name a repository of the hub; give user/name or organisation/name")
    if "/" not in name:
        raise UserError(f"'{name}' names no owner; give user/{name} or organisation/{name}")


def upload(name: str, kind: Kind, files: Mapping[str, Path], readme: str, replaces: str, *, private: bool, message: str) -> str:
    """Upload ``files`` (name in the repository → file) and ``readme`` as README.md to the repository ``name``, in one commit,
    and delete what else matches the pattern ``replaces``. A repository that does not exist is created. Returns its address.

    Raises :class:`UserError` if the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    _bars_on_terminals_only()
    api = HfApi(library_name="ims3-ray")
    try:
        address = api.create_repo(name, repo_type=kind, private=private, exist_ok=True)
        if private and not api.repo_info(name, repo_type=kind).private:
            raise UserError(f"the repository '{name}' exists and is public; make it private in its settings, or choose another")
        added = [CommitOperationAdd(each, file) for each, file in files.items()]
        added.append(CommitOperationAdd("README.md", readme.encode()))
        old = [each for each in api.list_repo_files(name, repo_type=kind) if fnmatch.fnmatch(each, replaces)]
        deleted = [CommitOperationDelete(each) for each in old if each not in files]
        api.create_commit(name, [*added, *deleted], repo_type=kind, commit_message=message)
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise UserError(
            f"the hub refuses the upload to '{name}' ({_first_line(error)}); log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write there"
        ) from error
    except ValueError as error:  # such as metadata of the card that the hub does not know
        raise UserError(f"the hub does not take the upload to '{name}': {_in_one_line(error)}") from error
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # of the HTTP library that the hub's uses
        raise UserError(
            f"the hub cannot be reached for the upload to '{name}' ({_first_line(error)}); check the network and HF_ENDPOINT"
        ) from error
    return str(address)


def _bars_on_terminals_only() -> None:
    """Keep the hub's progress bars out of logs."""
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _first_line(error: Exception) -> str:
    return first_line(error).rstrip(".")[:200]
