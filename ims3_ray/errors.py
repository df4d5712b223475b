"""The error that ends a command with one line and exit code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The message is one line: what is wrong, where, what to do."""
