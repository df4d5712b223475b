"""Weights files that every node of a cluster can find."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import file_hash
from ims3_ray.models.checkpoints import PICKLED, check_finite

TENSORS = (".safetensors", *PICKLED)
"""Endings of files that hold tensors."""


def itself(path: Path) -> Sequence[Path]:
    """The files of weights that are one file."""
    return (path,)


@dataclass(frozen=True)
class Weights:
    """A weights file. Processes exchange its reference, not its path, since each node fetches files into its own hub cache."""

    resolve: Callable[[str], Path]
    """Function that maps the reference to a file: ``generator_path``, ``encoder_path`` or ``autoencoder_path``."""
    reference: str
    digest: str
    """:func:`hash_of` the files with which the plan was made."""
    files: Callable[[Path], Sequence[Path]] = itself
    """Function that maps the file to all files that belong to it."""

    @classmethod
    def of(
        cls, resolve: Callable[[str], Path], reference: str, files: Callable[[Path], Sequence[Path]] = itself
    ) -> Weights:  # fmt: skip
        """The weights as found on this node. A path is made absolute, since other processes have other working folders.

        Raises :class:`UserError` for weights that hold values which are not finite.
        """
        local, parts = Path(reference).expanduser(), files(resolve(reference))
        for file in parts:
            if file.suffix in TENSORS:
                check_finite(file)
        return cls(resolve, str(local.resolve()) if local.exists() else reference, hash_of(parts), files)

    def path(self) -> Path:
        """The file on this node. Raises :class:`UserError` if its content, or that of a file that belongs to it, differs from
        that of the plan's file."""
        path = self.resolve(self.reference)
        if hash_of(self.files(path)) != self.digest:
            raise UserError(f"weights '{self.reference}' are not the same on every node; fetch or copy them there again")
        return path


def hash_of(files: Sequence[Path]) -> str:
    """:func:`file_hash` of a file, or a hash of those of several files."""
    hashes = [file_hash(file) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()
