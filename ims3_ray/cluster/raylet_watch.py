"""Ends a command whose own Ray has died: Ray's driver would wait for it, or end with messages of another cause."""

from __future__ import annotations

import _thread
import signal
import threading
from types import TracebackType

from ims3_ray.cluster.ray_internals import local_raylet
from ims3_ray.errors import IncompletePool

LOOK_EVERY_S = 1.0


class RayletWatch:
    """While it is entered, the death of the raylet on this machine interrupts the main thread, and what then leaves the block
    is an :class:`IncompletePool` of one line. In any other thread it does nothing."""

    def __init__(self) -> None:
        self.died = False
        self._over = threading.Event()

    def __enter__(self) -> RayletWatch:
        raylet = local_raylet()
        if raylet is not None and threading.current_thread() is threading.main_thread():
            threading.Thread(target=self._watch, args=(raylet,), name="raylet", daemon=True).start()
        return self

    def _watch(self, raylet: object) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            if raylet.poll() is not None:  # type: ignore[attr-defined]
                if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
                    return  # this process is ending because of SIGTERM, which has ended the raylet, too
                self.died = True
                # A shell script starts commands in the background with SIGINT ignored.
                ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
                _thread.interrupt_main(signal.SIGTERM if ignored else signal.SIGINT)
                return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:  # fmt: skip
        self._over.set()
        if self.died and error is not None:
            raise IncompletePool(
                "Ray on this machine has died (its raylet was killed, perhaps because memory ran out); run the same command "
                "again to continue"
            ) from error
