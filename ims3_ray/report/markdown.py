"""Text and tables in Markdown."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def plain(text: str) -> str:
    """``text`` on one line with the special characters of HTML and of tables escaped, so that it is shown as it is written."""
    return html.escape(" ".join(text.split()), quote=False).replace("|", "&#124;")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table. Cells are Markdown: names that people choose go through :func:`plain` first."""
    return [_line(head), "|---" * len(head) + "|", *(_line(row) for row in rows)]


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
