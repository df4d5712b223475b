"""Waiting for Ray tasks: their errors as one line, and none that goes on beside its own repetition."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from ims3_ray.cluster.capacity import CapacityWatch
from ims3_ray.cluster.joining import results
from ims3_ray.errors import Damaged, IncompletePool, UserError

CANCEL_S = 30.0
"""The most seconds that tasks are waited for after they were asked to end."""


def reason(error: BaseException) -> str:
    """An error as one line: the type of its cause, and the last line of its message."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return ": ".join([type(cause).__name__, *lines[-1:]])


def result_of(task: Any, title: str) -> Any:
    """The result of a task that has ended. An error of one line gets the ``title`` of the stage in front; any other, also that
    the process or its node has died, becomes an :class:`IncompletePool` of one line."""
    try:
        return results(task)
    except Damaged:
        raise
    except UserError as error:
        raise UserError(f"{title}: {error}") from error
    except ray.exceptions.RayError as error:
        raise IncompletePool(f"{title}: {reason(error)}; run the same command again to continue") from error


def awaited(tasks: Sequence[Any], title: str, watch: CapacityWatch) -> list[Any]:
    """The results of all ``tasks``, in their order, with errors as of :func:`result_of`. ``watch`` raises :class:`UserError`
    when the nodes are lost that could run them."""
    with ended_if_damaged(tasks):
        found = []
        for task in tasks:
            watch.first_done([task])
            found.append(result_of(task, title))
        return found


@contextmanager
def ended_if_damaged(running: Collection[Any]) -> Iterator[None]:
    """End those tasks of ``running`` that are left when a file is found to be damaged: the same work begins anew then."""
    try:
        yield
    except Damaged:
        left = list(running)
        for task in left:
            ray.cancel(task)
        if left:
            ray.wait(left, num_returns=len(left), timeout=CANCEL_S)
        raise
