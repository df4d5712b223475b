"""Notices when two processes work on the same run, or make the same artifact, at the same time."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage

RENEW_S = 20.0
"""Seconds between two renewals of a lease."""
FRESH_S = 90.0
"""Age in seconds up to which a lease shows that a process is working; a killed process leaves its last one behind."""
ENDING_S = 10.0
"""Seconds that a process of this machine is given to end: the task of a job outlives its killed command by a moment."""


def lease_path(run: str) -> str:
    return f"{run}/running.json"


def check_free(storage: Storage, run: str, aloud: bool = False) -> None:
    """Raises :class:`UserError` if a living process of this machine works on the run. For a process of another machine, which
    may have been killed a moment ago, a line is printed instead if ``aloud``."""
    deadline = time.monotonic() + ENDING_S
    while (other := _holder(storage, run)) and other["host"] == socket.gethostname() and time.monotonic() < deadline:
        time.sleep(0.5)
    if other:
        who = f"process {other['pid']} of {other['host']}"
        if other["host"] == socket.gethostname():
            raise UserError(
                f"run '{storage.address(run)}' is being run by {who}; wait until it ends, or give this one another name"
            )
        if aloud:
            print(
                f"note: {who} was working on '{storage.address(run)}' {time.time() - other['time']:.0f} s ago; if it is still "
                "running, the work of this command is done twice",
                flush=True,
            )


@contextmanager
def working_on(storage: Storage, run: str) -> Iterator[None]:
    """While it lasts, a file in the run folder says that this process works on the run. Raises the error of
    :func:`check_free`."""
    check_free(storage, run, aloud=True)
    over, mine = threading.Event(), {"host": socket.gethostname(), "pid": os.getpid()}

    def write() -> None:
        storage.write_json(lease_path(run), {**mine, "time": time.time()})

    def renew() -> None:
        while not over.wait(RENEW_S):
            with suppress(UserError):  # a full disk is reported by what needs it
                write()

    write()
    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=5)
        if mine.items() <= (storage.read_json(lease_path(run)) or {}).items():
            with suppress(OSError):
                storage.delete_file(lease_path(run))


def announce(artifact: Artifact, run: str, title: str) -> None:
    """Note that the run makes an artifact, and print a line if a run that is working now makes it, too."""
    path = f"{artifact.folder}/maker.json"
    before = artifact.storage.read_json(path)
    maker = str((before or {}).get("run", ""))
    if maker and maker != run and _holder(artifact.storage, maker):
        print(
            f"note: {title} is being made by run '{maker}', too; wait for it to end if the work should not be done twice",
            flush=True,
        )
    if maker != run:
        artifact.storage.write_json(path, {"run": run})
    artifact.used_by(run)


def _holder(storage: Storage, run: str) -> dict[str, Any] | None:
    """The lease of another process that seems to be working on a run; None if there is none."""
    lease = storage.read_json(lease_path(run))
    known = lease and isinstance(lease.get("time"), float) and isinstance(lease.get("pid"), int) and "host" in lease
    if not lease or not known or time.time() - lease["time"] > FRESH_S:
        return None
    if lease["host"] != socket.gethostname():
        return lease
    return lease if lease["pid"] != os.getpid() and _alive(int(lease["pid"])) else None


def _alive(pid: int) -> bool:
    """Whether a process of this machine is alive: not ended, and not a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"
