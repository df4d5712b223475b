"""Files that all processes of a machine share and that can be made again: copies of remote files, and decoded images.

They lie in ``~/.cache/ims3-ray`` (``$XDG_CACHE_HOME/ims3-ray``) and are removed when they have not been used for a week, or
earlier where their space is needed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from ims3_ray.errors import UserError

UNUSED_S = 7 * 24 * 3600.0
"""Seconds after its last use at which an entry is removed."""
IN_USE_S = 3600.0
"""An entry that was used within so many seconds is not removed to make space."""
LONGEST_MAKING_S = 24 * 3600.0
"""An unfinished entry that was begun within so many seconds is not removed."""
TEMPORARY, LOCK = ".tmp", ".lock"
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)
"""Errors that another disk or folder would not have."""


def cache_folder() -> Path:
    """The folder of this machine's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ims3-ray"


def cached(name: str, make: Callable[[Path], None], size: int, what: str) -> Path:
    """Path of the entry ``name``, a file or a folder. Where it is missing, ``make`` writes it to the path that it is given, in
    one process at a time while the others wait.

    ``size`` is the number of bytes that it takes, and ``what`` says what it is. A process may go on using a file that it has
    opened or mapped after the entry is removed. Raises :class:`UserError` if there is no space for it.
    """
    folder = cache_folder()
    entry = folder / name
    if not entry.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f"{name}{LOCK}"):
                if not entry.exists():
                    _make(entry, make, size, what)
        except OSError as error:
            if error.errno not in OF_THE_DISK:
                raise
            raise UserError(
                f"{what} cannot be kept in {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder with {size / 1e9:.1f} GB"
            ) from error
    with suppress(FileNotFoundError):
        os.utime(entry)
    return entry


def _make(entry: Path, make: Callable[[Path], None], size: int, what: str) -> None:
    _make_room(entry.parent, size, what)
    temporary = entry.with_name(f"{entry.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        make(temporary)
        with suppress(OSError) if entry.exists() else nullcontext():  # it exists if another process was faster
            temporary.rename(entry)
    finally:
        _remove(temporary)


def _make_room(folder: Path, size: int, what: str) -> None:
    """Remove entries that have not been used for long, and, if fewer than ``size`` bytes are free, others too."""
    ages = [(_age(path), path) for path in folder.iterdir() if path.suffix != LOCK]
    for age, path in sorted(ages, key=lambda each: each[0], reverse=True):
        short = shutil.disk_usage(folder).free < size
        in_use = age < (LONGEST_MAKING_S if path.suffix == TEMPORARY else IN_USE_S)
        if age > UNUSED_S or (short and not in_use):
            _remove(path)
            _remove(path.with_name(f"{path.name}{LOCK}"))
    if (free := shutil.disk_usage(folder).free) < size:
        raise UserError(
            f"{what} takes {size / 1e9:.1f} GB, and the disk of {folder} has {free / 1e9:.1f} GB left; free some, or set "
            "XDG_CACHE_HOME to a larger disk"
        )


def _age(path: Path) -> float:
    """Seconds since the last use of an entry; 0 if another process has removed it."""
    with suppress(FileNotFoundError):
        return time.time() - path.stat().st_mtime
    return 0.0


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file. Where the file system has no locks, several processes may make the same entry; each writes it
    whole, and one of them is kept."""
    with path.open("w") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
