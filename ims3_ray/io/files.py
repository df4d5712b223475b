"""Files and folders on this machine, on object storage (``s3://``, ``gs://``), or on any other storage that fsspec supports."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import SplitResult, unquote, urlsplit
from uuid import uuid4

from pyarrow import fs

from ims3_ray.errors import UserError, first_line
from ims3_ray.io.node_cache import cached

T = TypeVar("T")
R = TypeVar("R")

ATTEMPTS = 10
"""Number of attempts of a request to object storage, with growing pauses: some 80 seconds in all."""
BUCKETS = ("s3", "gs", "gcs")
"""URI schemes of object storage."""
REQUEST_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5.0


def is_remote(location: str) -> bool:
    """Whether ``location`` is a URI of storage other than this machine's disks."""
    return "://" in location and not location.startswith("file://")


def open_filesystem(location: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path on it.

    Credentials, region and endpoint of object storage come from its own environment variables and files (``AWS_…``,
    ``GOOGLE_APPLICATION_CREDENTIALS``). Raises :class:`UserError` for a URI that contains any of them, since URIs are written
    to files.
    """
    if not is_remote(location):
        return fs.LocalFileSystem(), str(_local(location).absolute())
    parts, filesystem = _plain(location), _opened(location, ATTEMPTS)
    if isinstance(filesystem, fs.PyFileSystem):  # whether the host is a part of the path differs from one storage to another
        from fsspec.core import url_to_fs

        return filesystem, str(url_to_fs(location)[1]).rstrip("/")
    return filesystem, f"{parts.netloc}{parts.path}".rstrip("/")


def check_bucket(location: str) -> None:
    """Raises :class:`UserError`, after few attempts, if a bucket of object storage cannot be reached or does not exist."""
    parts = _plain(location)
    if parts.scheme not in BUCKETS:
        return
    try:
        there = _opened(location, 2).get_file_info(parts.netloc).type != fs.FileType.NotFound
    except OSError as error:
        raise UserError(f"'{location}' cannot be reached: {first_line(error)}") from error
    if not there:
        raise UserError(f"'{location}' cannot be used: there is no bucket '{parts.netloc}', or none that you may see")


def _local(location: str) -> Path:
    return Path(unquote(urlsplit(location).path)) if location.startswith("file://") else Path(location).expanduser()


def _plain(location: str) -> SplitResult:
    parts = urlsplit(location)
    named = parts.scheme in BUCKETS and ":" in parts.netloc  # as in KEY:SECRET@BUCKET, also if a secret with "/" cuts it
    if is_remote(location) and ("@" in parts.netloc or parts.query or parts.fragment or named):
        raise UserError(
            f"a URI '{parts.scheme}://…' is given with credentials or options, which would be written down with it; give the "
            "plain URI, and the rest in the environment (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, …)"
        )
    return parts


def _opened(location: str, attempts: int) -> fs.FileSystem:
    parts = urlsplit(location)
    try:
        return _remote(parts.scheme, parts.netloc, attempts)
    except (OSError, ValueError, ImportError, TypeError) as error:  # TypeError: a storage that needs more than a URI
        raise UserError(f"'{location}' cannot be reached: {first_line(error)}") from error


@cache
def _remote(scheme: str, bucket: str, attempts: int) -> fs.FileSystem:
    """The file system for all files of a bucket, opened once per process."""
    if scheme == "s3":
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if region is None and endpoint is None:
            region = fs.resolve_s3_region(bucket)
        return fs.S3FileSystem(
            region=region, endpoint_override=endpoint, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
            request_timeout=REQUEST_TIMEOUT_S, connect_timeout=CONNECT_TIMEOUT_S,
            allow_delayed_open=True,  # a small file is one request; a large one is sent in parts and appears when complete
        )  # fmt: skip
    if scheme in ("gs", "gcs"):
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=8 * attempts))
    from fsspec.core import url_to_fs

    return fs.PyFileSystem(fs.FSSpecHandler(url_to_fs(f"{scheme}://{bucket}/")[0]))


NUMBERS = re.compile(r"\d+")
HIDDEN = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini")
"""Names of files and folders that operating systems put beside a user's files."""


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is no part of a user's data: ``.git``, ``.ipynb_checkpoints``, ``._photo.png``,
    ``__MACOSX`` and the like."""
    return name.startswith(".") or name in HIDDEN


def check_name(name: str, folder: str) -> str:
    """``name``. Raises :class:`UserError` for the name of a file or folder that is not UTF-8, as old archives have some."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name {os.fsencode(name)!r} in '{folder}' is not UTF-8; rename it, as `convmv` does") from error
    return name


def natural(path: str) -> tuple[str, str]:
    """Sort key of a path, by its parts. Numbers in names are compared as numbers, so that ``unit-10`` follows ``unit-9``."""
    # "\0" ends a part and "\1" begins a number. Both precede all other characters, so a shorter text precedes a longer one.
    # The number of digits precedes the digits, so numbers of fewer digits come first.
    return NUMBERS.sub(_number_key, path).replace("/", "\0"), path


def _number_key(found: re.Match[str]) -> str:
    digits = str(int(found[0]))
    return f"\1{len(digits):03d}{digits}"


REQUESTS = 16
"""Number of requests that are sent to a storage at the same time, because object storage answers slowly."""


def concurrently(request: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """The results of ``request`` for each item, in order; several requests run at the same time."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(request, items))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads round in a circle is none."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Raises :class:`UserError` if the block may not read the file or folder ``path``."""
    try:
        yield
    except PermissionError as error:
        raise UserError(f"'{path}' may not be read by this user; correct its permissions, or leave it out") from error


@dataclass(frozen=True)
class Place:
    """A path with its file system and what is there: a file, a folder or nothing."""

    filesystem: fs.FileSystem
    path: str
    kind: fs.FileType
    size: int = 0
    """Size of a file in bytes."""
    mtime_ns: int | None = None

    @classmethod
    def at(cls, location: str) -> Place:
        filesystem, path = open_filesystem(location)
        return cls._of(filesystem, filesystem.get_file_info(path))

    @classmethod
    def _of(cls, filesystem: fs.FileSystem, info: fs.FileInfo) -> Place:
        return cls(filesystem, info.path, info.type, info.size or 0, info.mtime_ns)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def is_file(self) -> bool:
        return bool(self.kind == fs.FileType.File)

    @property
    def is_folder(self) -> bool:
        return bool(self.kind == fs.FileType.Directory)

    @property
    def exists(self) -> bool:
        return self.is_file or self.is_folder

    def parents(self, count: int) -> list[Place]:
        """The ``count`` folders above, from the nearest on."""
        names = [self.path.rsplit("/", up)[0] for up in range(1, min(count, self.path.count("/")) + 1)]
        return [self._of(self.filesystem, self.filesystem.get_file_info(name)) for name in names if name]

    def child(self, name: str) -> Place:
        return self._of(self.filesystem, self.filesystem.get_file_info(f"{self.path}/{name}"))

    def children(self, ending: str = "") -> list[Place]:
        """Contents of the folder without hidden ones, in the order of :func:`natural`; of its files only those whose names have
        this ``ending``."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            with readable(self.path), os.scandir(self.path) as entries:
                names = [entry.name for entry in entries if entry.name.endswith(ending) or _is_folder(entry)]
            paths = [f"{self.path.rstrip('/')}/{check_name(name, self.path)}" for name in names]
            found = self.filesystem.get_file_info(paths)
        else:
            infos = self.filesystem.get_file_info(fs.FileSelector(self.path))
            found = [info for info in infos if info.base_name.endswith(ending) or info.type == fs.FileType.Directory]
        seen = [info for info in found if not is_hidden(info.base_name)]
        return [self._of(self.filesystem, info) for info in sorted(seen, key=lambda info: natural(info.base_name))]

    def lines(self) -> list[str]:
        """The lines of a text file that are not blank, without the space around them. Raises :class:`UserError` if it is not
        UTF-8."""
        try:
            text = self.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"'{self.path}' is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
        return [line.strip() for line in text.splitlines() if line.strip()]

    def read_piece(self, first: int, count: int) -> bytes:
        """At most ``count`` bytes of the file from byte ``first`` on; fewer at its end."""
        with readable(self.path), self.filesystem.open_input_file(self.path) as file:
            return bytes(file.read_at(min(count, self.size - first), first))

    def read(self) -> bytes:
        with readable(self.path), self.filesystem.open_input_stream(self.path, compression=None) as stream:
            return bytes(stream.read())


def new_file(out: str) -> Path:
    """The path ``out`` of a file that a command will write. Raises :class:`UserError` if it exists, or if its folder does
    not."""
    path = Path(out)
    if path.exists():
        raise UserError(f"'{path}' exists; choose another out= or remove it")
    if not path.parent.is_dir():
        raise UserError(f"the folder of out='{path}' does not exist; make it, or choose another")
    return path


@contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A path beside ``out`` for a file or folder that becomes ``out`` when the block has ended, and is removed if it fails.
    Raises :class:`UserError` if it cannot be written."""
    draft = out.with_name(f".{out.name}.{uuid4().hex[:8]}")
    try:
        yield draft
        draft.rename(out)
    except OSError as error:
        raise UserError(f"'{out}' cannot be written: {first_line(error)}") from error
    finally:
        if draft.is_dir():
            shutil.rmtree(draft, ignore_errors=True)
        else:
            draft.unlink(missing_ok=True)


def remote_files(folder: Place) -> list[fs.FileInfo]:
    """All files below a folder that is not on this machine's disks, without hidden ones, in the order of :func:`natural`."""
    start = len(folder.path.rstrip("/")) + 1
    infos = folder.filesystem.get_file_info(fs.FileSelector(folder.path, recursive=True))
    files = [(info.path[start:], info) for info in infos if info.type == fs.FileType.File]
    seen = [(path, info) for path, info in files if not any(map(is_hidden, path.split("/")))]
    return [info for _, info in sorted(seen, key=lambda each: natural(each[0]))]


def local_copy(location: str) -> Path:
    """Path on this machine of a file or folder: of a local one itself, of a remote one a cached copy, which is made again only
    when the remote one has changed. Raises :class:`UserError` if the bucket cannot be used."""
    if not is_remote(location):
        return _local(location)
    check_bucket(location)
    place = Place.at(location)
    if not place.exists:
        raise UserError(f"'{location}' does not exist; check the path")
    files = [place] if place.is_file else [Place._of(place.filesystem, info) for info in remote_files(place)]
    described = repr([location, *((file.path, file.size, file.mtime_ns) for file in files)])
    state = hashlib.sha256(described.encode()).hexdigest()[:16]

    def copy(target: Path) -> None:
        for file in files:
            copied = Path(target, place.name, file.path[len(place.path) :].lstrip("/"))
            if ".." in copied.parts:
                raise UserError(f"'{location}' holds a file '{file.path}' that would leave its folder; remove it")
            copied.parent.mkdir(parents=True, exist_ok=True)
            with file.filesystem.open_input_stream(file.path, compression=None) as stream, copied.open("wb") as out:
                while part := stream.read(2**24):
                    out.write(part)

    return cached(state, copy, sum(file.size for file in files), f"a copy of '{location}'") / place.name
