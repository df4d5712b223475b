"""Files below one URI, on this machine or on object storage: read, written atomically, listed, set aside when damaged."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pyarrow import fs

from ims3_ray.errors import UserError, first_line
from ims3_ray.io.files import check_bucket, is_remote, natural, open_filesystem

PASSING = (".tmp", ".damaged")
"""Endings of files that are no output: unfinished ones, and damaged ones that were set aside."""


@dataclass(frozen=True)
class Storage:
    """Files below one URI: a local path, ``s3://…`` or ``gs://…``. Only the URI is pickled; each process opens it anew."""

    uri: str

    @classmethod
    def at(cls, location: str) -> Storage:
        """The storage at ``location``; a local path is made absolute. Raises :class:`UserError` for a URI that cannot be
        used."""
        if not is_remote(location):
            folder = Path(open_filesystem(location)[1]).resolve()
            if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
                raise UserError(f"storage '{location}' is a file or lies in one; give a folder")
            return cls(str(folder))
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

    @cached_property
    def looked_at(self) -> set[str]:
        """Folders of artifacts whose shards this process has looked for, and whose use it has noted."""
        return set()

    def look_again(self) -> None:
        """Forget what this process knows of the storage, since something there is damaged."""
        self.manifests.clear()
        self.looked_at.clear()

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
        return self._type(path) == fs.FileType.File

    def is_folder(self, path: str) -> bool:
        return self._type(path) == fs.FileType.Directory

    def _type(self, path: str) -> fs.FileType:
        with self._naming(path, "read"):
            return self.filesystem.get_file_info(self.on_filesystem(path)).type

    def read(self, path: str) -> bytes:
        """The content of a file. Raises ``FileNotFoundError`` if there is none, and :class:`UserError` if it cannot be read."""
        place = self.on_filesystem(path)
        with self._naming(path, "read"), self.filesystem.open_input_stream(place, compression=None) as stream:
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
    def _naming(self, path: str, verb: Literal["read", "write"] = "write") -> Iterator[None]:
        """Turn a failure to read or write ``path`` into a :class:`UserError` with the reason. That a file is not there is no
        failure to read it."""
        try:
            yield
        except OSError as error:
            if verb == "read" and isinstance(error, FileNotFoundError):
                raise
            reason = error.strerror or first_line(error)
            check = "check storage and its free space" if verb == "write" else "check storage and the credentials for it"
            raise UserError(f"cannot {verb} {self.address(path)}: {reason}; {check}") from error
        except NotImplementedError as error:  # a web server, say
            raise UserError(f"storage of this kind cannot be used to {verb} {self.address(path)}; choose another") from error

    def files(self, folder: str, recursive: bool = False) -> dict[str, fs.FileInfo]:
        """Path within ``folder`` → size and time of each file directly in it, or of each file below it if ``recursive`` is set;
        empty if there is no such folder."""
        place = self.on_filesystem(folder)
        with self._naming(folder, "read"):
            found = self.filesystem.get_file_info(fs.FileSelector(place, allow_not_found=True, recursive=recursive))
        files = [f for f in found if f.type == fs.FileType.File and not f.base_name.endswith(PASSING)]
        return {f.path[len(place) :].lstrip("/") if recursive else f.base_name: f for f in files}

    def names(self, folder: str) -> set[str]:
        """Names of the files directly in ``folder``; empty if there is no such folder."""
        return set(self.files(folder))

    def folders(self, folder: str) -> list[str]:
        """Names of the folders directly in ``folder``, in natural order; empty if there is no such folder."""
        selector = fs.FileSelector(self.on_filesystem(folder), allow_not_found=True)
        with self._naming(folder, "read"):
            found = self.filesystem.get_file_info(selector)
        return sorted((f.base_name for f in found if f.type == fs.FileType.Directory), key=natural)

    def read_json(self, path: str) -> dict[str, Any] | None:
        """The JSON object in a file; None if there is no such file. A file that holds none is set aside (:meth:`set_aside`) and
        counts as missing."""
        try:
            found = json.loads(self.read(path))
        except FileNotFoundError:
            return None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.set_aside(path)
            print(f"note: {self.address(path)} is damaged and counts as missing", flush=True)
            return None
        return found

    def write_json(self, path: str, values: Any) -> None:
        """Write values as a JSON file, atomically. Raises :class:`UserError` for numbers that are not finite, which JSON does
        not have."""
        self.write(path, as_json(values, self.address(path)))

    def set_aside(self, path: str) -> None:
        """Rename a damaged file to ``….damaged``, so that it counts as missing and can still be looked at."""
        with self._naming(path), suppress(FileNotFoundError):  # another process was faster
            self.filesystem.move(self.on_filesystem(path), self.on_filesystem(f"{path}.damaged"))

    def delete(self, folder: str) -> None:
        """Delete a folder and its contents; nothing happens if the folder does not exist."""
        for path in [path for path in self.manifests if path.startswith(f"{folder}/")]:
            del self.manifests[path]
        if self.is_folder(folder):
            self.filesystem.delete_dir(self.on_filesystem(folder))

    def delete_file(self, path: str) -> None:
        self.manifests.pop(path, None)
        self.filesystem.delete_file(self.on_filesystem(path))


def as_json(values: Any, where: str, sort_keys: bool = False) -> bytes:
    """JSON text for the file ``where``. Raises :class:`UserError` for numbers that are not finite, which JSON does not have."""
    try:
        return json.dumps(values, indent=1, sort_keys=sort_keys, allow_nan=False).encode()
    except ValueError as error:
        raise UserError(f"cannot write {where}: it would hold a value that is not a finite number ({error})") from error
