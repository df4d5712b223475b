"""Keeps messages of Ray's C++ code that need no action by the user off the terminal."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

NOISE = re.compile(rb"core_worker\.cc:\d+: Actor with class name: .* has constructor arguments in the object store")
"""Lines that are not shown. Ray Data starts its actors in this way, and a pool whose arguments are lost is started again."""


@contextmanager
def without_noise() -> Iterator[None]:
    """Send what C++ code writes to file descriptor 2 through a filter. Python's own ``sys.stderr`` writes past it."""
    python, real = sys.stderr, os.dup(2)
    reader, writer = os.pipe()
    sys.stderr.flush()
    os.dup2(writer, 2)
    os.close(writer)
    if getattr(python, "fileno", None) is not None and _number(python) == 2:
        sys.stderr = open(real, "w", buffering=1, errors="replace", closefd=False)  # noqa: SIM115
    thread = threading.Thread(target=_copy, args=(reader, real), name="stderr", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = python
        os.dup2(real, 2)  # closes the last writing end of the pipe, unless another process has inherited it
        thread.join(timeout=1)


def _number(stream: object) -> int:
    try:
        return int(stream.fileno())  # type: ignore[attr-defined]
    except (OSError, ValueError):
        return -1


def _copy(reader: int, real: int) -> None:
    with open(reader, "rb", buffering=0) as stream:
        rest = b""
        while part := stream.read(65_536):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if not NOISE.search(line):
                    os.write(real, line + b"\n")
        if rest:
            os.write(real, rest)
