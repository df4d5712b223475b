"""Weights files that every node of a cluster can find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import file_hash
from ims3_ray.models.checkpoints import check_finite


@dataclass(frozen=True)
class Weights:
    """A weights file. Processes exchange its reference, not its path, since each node fetches files into its own hub cache."""

    resolve: Callable[[str], Path]
    """Function that maps the reference to a file: ``generator_path``, ``encoder_path`` or ``autoencoder_path``."""
    reference: str
    digest: str
    """:func:`file_hash` of the file with which the plan was made."""

    @classmethod
    def of(cls, resolve: Callable[[str], Path], reference: str) -> Weights:
        """The weights as found on this node. A path is made absolute, since other processes have other working folders.

        Raises :class:`UserError` for weights that hold values which are not finite.
        """
        local, path = Path(reference).expanduser(), resolve(reference)
        check_finite(path)
        return cls(resolve, str(local.resolve()) if local.exists() else reference, file_hash(path))

    def path(self) -> Path:
        """The file on this node. Raises :class:`UserError` if its content differs from that of the plan's file."""
        path = self.resolve(self.reference)
        if file_hash(path) != self.digest:
            raise UserError(f"weights '{self.reference}' are not the same on every node; fetch or copy them there again")
        return path
