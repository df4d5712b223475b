"""Weights files as every node of a cluster finds them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ims3_ray.artifacts import file_hash
from ims3_ray.errors import UserError


@dataclass(frozen=True)
class Weights:
    """A reference travels, not a path: what one node's hub cache holds, another has to fetch for itself."""

    resolve: Callable[[str], Path]
    """From reference to file: ``generator_path``, ``encoder_path`` or ``autoencoder_path``."""
    reference: str
    digest: str
    """:func:`file_hash` of the file with which the plan was made."""

    @classmethod
    def of(cls, resolve: Callable[[str], Path], reference: str) -> Weights:
        """Found on this node; a path is made absolute, since other processes work elsewhere."""
        local = Path(reference).expanduser()
        return cls(resolve, str(local.resolve()) if local.exists() else reference, file_hash(resolve(reference)))

    def path(self) -> Path:
        """The file on the node that asks; :class:`UserError` if it is another one than the plan's."""
        path = self.resolve(self.reference)
        if file_hash(path) != self.digest:
            raise UserError(f"weights '{self.reference}' are not the same on every node; fetch or copy them there again")
        return path
