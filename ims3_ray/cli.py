"""What all jobs share: arguments, one-line errors, exit codes."""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from ims3_ray.config.files import read_values
from ims3_ray.config.keys import check_keys
from ims3_ray.errors import IncompletePool, UserError
from ims3_ray.provenance import record_command

if TYPE_CHECKING:
    from ims3_ray.config.loading import Tree


INTERRUPTED, TERMINATED, CLOSED = 130, 143, 141
"""Exit codes after Ctrl-C (SIGINT), after SIGTERM, and when the reader of the output has gone (SIGPIPE)."""


def main(
    doc: str,
    tree: type[Tree] | str,
    run: Callable[[Tree], None] | str,
    plan: Callable[[Tree], str] | str | None = None,
    arguments: list[str] | None = None,
) -> int:
    """Parse, load the config, call ``run`` (or print ``plan`` for ``--dry-run``).

    ``tree``, ``run`` and ``plan`` may be given as ``module:name``. They are then imported only when needed, so that ``--help``
    and the error for a misspelt key appear at once.

    Exit codes: 0 success, 1 work that failed on every attempt (one line on stderr), 2 an error that the user can correct (one
    line on stderr), 130 interrupted, 143 terminated (SIGTERM), 141 if nobody reads the output any more. Any other error gives
    a traceback and 1.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config values, e.g. selection.alpha=0.4")
    parser.add_argument(
        "--config", metavar="FILE", action="append", help="YAML config (may name others under 'extends'); several add up"
    )
    if plan is not None:
        parser.add_argument("--dry-run", action="store_true", help="print the plan and stop: nothing is computed or written")

    def work() -> None:
        args = parser.parse_intermixed_args(arguments)
        values = read_values(args.config, args.overrides)
        names = [word for file in args.config or () for word in ("--config", Path(file).name)]
        record_command([f"jobs/{Path(sys.argv[0]).name}", *names, *args.overrides])
        if isinstance(tree, str):
            check_keys(tree.partition(":")[2], values)
        from ims3_ray.config.loading import build

        config: Any = build(_found(tree), values)
        if plan is not None and args.dry_run:
            print(_found(plan)(config))
        else:
            _run(_found(run), config)

    return guarded(work)


def guarded(work: Callable[[], None]) -> int:
    """Call ``work`` and return the exit code of :func:`main`, after one line on stderr where it is not 0."""
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


def _found(named: Any) -> Any:
    """The object that a string ``module:name`` names; any other value is returned unchanged."""
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    return getattr(import_module(module), name)


def _run(run: Callable[[Any], None], config: Any) -> None:
    """Call ``run(config)``. Work for a cluster runs on a node that has CPUs for it; anything else, such as a benchmark, runs
    here and needs no Ray."""
    from ims3_ray.config import PretrainConfig, WorkConfig

    if not isinstance(config, WorkConfig | PretrainConfig):
        run(config)
        return
    from ims3_ray.cluster.off_head import run_off_the_head

    run_off_the_head(run, config)
