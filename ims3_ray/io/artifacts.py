"""Content-addressed stage outputs on one storage URI.

{uri}/artifacts/{stage}/{key}/manifest.json     written last; its presence commits the artifact
{uri}/artifacts/{stage}/{key}/shards/…          a shard appears under its name only when it is complete
{uri}/{run name}/                               output of a run: report, results, distilled data set
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pyarrow import fs

from ims3_ray.errors import UserError
from ims3_ray.io.files import check_bucket, is_remote, open_filesystem


@dataclass(frozen=True)
class Storage:
    """Files below one URI: a local path, ``s3://…`` or ``gs://…``. Only the URI is pickled; each process opens it anew."""

    uri: str

    @classmethod
    def at(cls, location: str) -> Storage:
        """The storage at ``location``; a local path is made absolute. Raises :class:`UserError` for a URI that cannot be
        used."""
        if not is_remote(location):
            return cls(str(Path(open_filesystem(location)[1]).resolve()))
        open_filesystem(location)
        check_bucket(location)
        return cls(location.rstrip("/"))

    @cached_property
    def _opened(self) -> tuple[fs.FileSystem, str]:
        return open_filesystem(self.uri)

    @cached_property
    def manifests(self) -> dict[str, dict[str, Any] | None]:
        """Path → manifest as this process has read it, None if there was none. Each is read once per command."""
        return {}

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
        """``path`` as a path of :attr:`filesystem`. Raises :class:`UserError` for one outside the storage."""
        if ".." in path.split("/"):
            raise UserError(f"'{path}' would leave the storage '{self.uri}'")
        return f"{self._root}/{path}" if path else self._root

    def local_path(self, path: str) -> Path | None:
        """``path`` as a local path of this machine; None on remote storage."""
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
        """Write a file atomically: a reader never sees a part of it. Raises :class:`UserError` if it cannot be written."""
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
        """Turn a failure to write ``path`` into a :class:`UserError` with the reason."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise UserError(f"cannot write {self.address(path)}: {reason}; check storage and its free space") from error

    def names(self, folder: str) -> set[str]:
        """Names of the files directly in ``folder``; empty if there is no such folder."""
        selector = fs.FileSelector(self.on_filesystem(folder), allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        return {f.base_name for f in found if f.type == fs.FileType.File and not f.base_name.endswith(".tmp")}

    def delete(self, folder: str) -> None:
        """Delete a folder and its contents; nothing happens if the folder does not exist."""
        for path in [path for path in self.manifests if path.startswith(f"{folder}/")]:
            del self.manifests[path]
        if self.is_folder(folder):
            self.filesystem.delete_dir(self.on_filesystem(folder))

    def delete_file(self, path: str) -> None:
        self.manifests.pop(path, None)
        self.filesystem.delete_file(self.on_filesystem(path))


@dataclass(frozen=True)
class Artifact:
    """The output of one stage: shards, and a manifest that is written after them."""

    storage: Storage
    stage: str
    key: str

    @property
    def folder(self) -> str:
        return f"artifacts/{self.stage}/{self.key}"

    @property
    def address(self) -> str:
        """The artifact's folder as a full path or URI."""
        return self.storage.address(self.folder)

    @property
    def _manifest_path(self) -> str:
        return f"{self.folder}/manifest.json"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the artifact is not committed. It is read once and remembered: see :meth:`look_again`."""
        known, path = self.storage.manifests, self._manifest_path
        if path not in known:
            try:
                known[path] = json.loads(self.storage.read(path))
            except FileNotFoundError:
                known[path] = None
        return known[path]

    def look_again(self) -> None:
        """Forget the remembered manifest, since another process may have written a new one."""
        self.storage.manifests.pop(self._manifest_path, None)

    def commit(self, manifest: Mapping[str, Any]) -> None:
        self.storage.write(self._manifest_path, json.dumps(manifest, indent=1, sort_keys=True).encode())
        self.storage.manifests[self._manifest_path] = json.loads(json.dumps(manifest))

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
    """16 hex digits that change with the stage's name and version, the parameters on which it depends, and its inputs."""
    described = json.dumps([stage, version, params, dict(sorted(inputs.items()))], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """16 hex digits of a file's SHA-256. A process reads a file again only if its size or time of modification has changed."""
    state = path.stat()
    return _file_hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(64)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
