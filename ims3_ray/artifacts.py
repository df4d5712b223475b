"""Content-addressed stage outputs on one storage URI.

{uri}/artifacts/{stage}/{key}/manifest.json     written last; its presence is the commit
{uri}/artifacts/{stage}/{key}/shards/…          a shard appears under its name only when whole
{uri}/{run name}/                               what a run leaves: report, results, distilled data set
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pyarrow import fs

from ims3_ray.data.files import check_bucket, is_remote, open_filesystem
from ims3_ray.errors import UserError


@dataclass(frozen=True)
class Storage:
    """Files below one URI: a local path, ``s3://…`` or ``gs://…``. Travels between processes as its URI."""

    uri: str

    @classmethod
    def at(cls, location: str) -> Storage:
        """``location`` with a local path made absolute; :class:`UserError` for a URI that cannot be used."""
        if not is_remote(location):
            return cls(str(Path(open_filesystem(location)[1]).resolve()))
        open_filesystem(location)
        check_bucket(location)
        return cls(location.rstrip("/"))

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        return open_filesystem(self.uri)

    @property
    def filesystem(self) -> fs.FileSystem:
        return self._opened[0]

    @property
    def _root(self) -> str:
        return self._opened[1]

    def __getstate__(self) -> dict[str, str]:
        return {"uri": self.uri}

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def on_filesystem(self, path: str) -> str:
        """``path`` as :attr:`filesystem` knows it; :class:`UserError` for one that would leave the storage."""
        if ".." in path.split("/"):
            raise UserError(f"'{path}' would leave the storage '{self.uri}'")
        return f"{self._root}/{path}" if path else self._root

    def local_path(self, path: str) -> Path | None:
        """Where ``path`` lies on this machine, or None on remote storage."""
        return Path(self.on_filesystem(path)) if self.is_local else None

    def address(self, path: str) -> str:
        """``path`` as a full path or URI."""
        return f"{self.uri.rstrip('/')}/{path}"

    def exists(self, path: str) -> bool:
        return self.filesystem.get_file_info(self.on_filesystem(path)).type == fs.FileType.File

    def is_folder(self, path: str) -> bool:
        return self.filesystem.get_file_info(self.on_filesystem(path)).type == fs.FileType.Directory

    def read(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(self.on_filesystem(path), compression=None) as stream:
            return bytes(stream.read())

    def write(self, path: str, data: bytes) -> None:
        """Write a whole file or nothing: a reader never sees a part of it. :class:`UserError` if that is not possible."""
        target = self.on_filesystem(path)
        if not self.is_local:  # object stores show an object when its upload is complete
            with self._naming(path), self.filesystem.open_output_stream(target, compression=None) as stream:
                stream.write(data)
            return
        temporary = f"{target}.{uuid.uuid4().hex[:8]}.tmp"
        with self._naming(path):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                Path(temporary).write_bytes(data)
                os.replace(temporary, target)
            except OSError:
                Path(temporary).unlink(missing_ok=True)
                raise

    def make_folder(self, folder: str) -> None:
        with self._naming(folder):
            self.filesystem.create_dir(self.on_filesystem(folder), recursive=True)

    @contextmanager
    def _naming(self, path: str) -> Iterator[None]:
        """Failures to write, as errors that a person can act on."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise UserError(f"cannot write {self.address(path)}: {reason}; check storage and its free space") from error

    def names(self, folder: str) -> set[str]:
        """Names of the files directly in ``folder``; empty if there is none."""
        selector = fs.FileSelector(self.on_filesystem(folder), allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return {f.base_name for f in found if f.type == fs.FileType.File and not f.base_name.endswith(".tmp")}

    def delete(self, folder: str) -> None:
        """Delete a folder and what is in it; nothing happens if there is none."""
        if self.is_folder(folder):
            self.filesystem.delete_dir(self.on_filesystem(folder))

    def delete_file(self, path: str) -> None:
        self.filesystem.delete_file(self.on_filesystem(path))


@dataclass(frozen=True)
class Artifact:
    """The output of one stage: shards, then a manifest."""

    storage: Storage
    stage: str
    key: str

    @property
    def folder(self) -> str:
        return f"artifacts/{self.stage}/{self.key}"

    @property
    def address(self) -> str:
        """As a full path or URI."""
        return self.storage.address(self.folder)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the artifact is not committed."""
        path = f"{self.folder}/manifest.json"
        return json.loads(self.storage.read(path)) if self.storage.exists(path) else None

    def commit(self, manifest: Mapping[str, Any]) -> None:
        self.storage.write(f"{self.folder}/manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())

    def shards(self) -> set[str]:
        return self.storage.names(f"{self.folder}/shards")

    def read(self, shard: str) -> bytes:
        return self.storage.read(f"{self.folder}/shards/{shard}")

    def forget(self, shard: str) -> None:
        """Delete a shard."""
        self.storage.delete_file(f"{self.folder}/shards/{shard}")

    def write(self, shard: str, data: bytes) -> str:
        """Store a shard; returns its SHA-256."""
        self.storage.write(f"{self.folder}/shards/{shard}", data)
        return hashlib.sha256(data).hexdigest()


def key_of(stage: str, version: int, params: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """16 hex digits that change with the stage's version, what it depends on in the config, or its inputs."""
    described = json.dumps([stage, version, params, dict(sorted(inputs.items()))], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """16 hex digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
