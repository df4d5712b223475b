"""Errors that end a command with one line instead of a traceback."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can correct. The message is one line: what is wrong, where, what to do. Exit code 2."""


class Unanimous(UserError):
    """An error that all workers of a training raise at the same step, so that none waits for the others. The training is not
    tried again."""


class Diverged(Unanimous):
    """A training whose loss, or a model whose weights, are not finite numbers."""


class Damaged(UserError):
    """A stored file that is missing or is not the one that was written. It counts as missing from now on, so the next command
    that needs it makes it again."""


class IncompletePool(Exception):
    """Work that failed on every attempt: the message says what is missing and why. Exit code 1."""


def masked(text: str) -> str:
    """``text`` without the user and password that a URI in it may carry."""
    return re.sub(r"//[^/@\s]+@", "//…@", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def not_there(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a ``name`` that no ``what`` has: the nearest of the ``known`` names, and all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean '{near[0]}'? " if near else ""
    return f"no {what} is called '{name}'; {meant}there is: {', '.join(names)}"
