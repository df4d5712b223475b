"""Errors that end a command with one line instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, what to do. Exit code 2."""


class IncompletePool(Exception):
    """Work that failed on every attempt: the message says what is missing and why. Exit code 1."""
