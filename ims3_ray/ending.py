"""How a command ends: with one line and an exit code instead of a traceback."""

from __future__ import annotations

import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TextIO

from ims3_ray.errors import IncompletePool, UserError

INTERRUPTED, TERMINATED, CLOSED = 130, 143, 141
"""Exit codes after Ctrl-C (SIGINT), after SIGTERM, and when the reader of the output has gone (SIGPIPE)."""


def guarded(work: Callable[[], None]) -> int:
    """Call ``work`` and return the exit code, after one line on stderr where it is not 0.

    0 success, 1 work that failed on every attempt, 2 an error that the user can correct, 130 interrupted, 143 terminated
    (SIGTERM), 141 if nobody reads the output any more. Any other error gives a traceback and 1.
    """
    prepare_streams()
    asked = threading.Event()
    try:
        with ended_by_sigterm(asked):
            work()
            sys.stdout.flush()
    except (UserError, IncompletePool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print(f"{'terminated' if asked.is_set() else 'interrupted'}; the same command continues", file=sys.stderr)
        return TERMINATED if asked.is_set() else INTERRUPTED
    except BrokenPipeError:
        if not _closed(sys.stdout):
            raise  # a connection of another kind was lost
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        return CLOSED
    return 0


def _closed(stream: TextIO) -> bool:
    """Whether ``stream`` is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def prepare_streams() -> None:
    """Let output to a terminal that lacks a character, such as λ in ASCII, show a question mark in its place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def ended_by_sigterm(asked: threading.Event) -> Iterator[None]:
    """While it lasts, SIGTERM, by which Slurm, Kubernetes and spot machines end a process, sets ``asked`` and raises
    ``KeyboardInterrupt`` in the main thread."""

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one is enough: the run is ending
        asked.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
