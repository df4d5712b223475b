"""Charts of the reports as SVG text, which takes the colours of the page and shrinks to its width."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from html import escape
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#123456"
"""Colour of text and axes, in whose place the SVG names the colour of the page's text."""
COLOURS = ("#1f83b4", "#d1730f", "#3a9a4a", "#c94f4f", "#8a6cc0", "#9a6a40", "#c05a9e", "#7d8d97", "#9a9a1f", "#1f9a9a")
"""Colours of lines, with enough contrast on light and on dark pages."""
DASHES = ("-", "--", ":", "-.")
"""Styles of lines, which can be told apart without colour."""
STYLE = {
    "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "ims3-ray", "text.parse_math": False, "figure.facecolor": "none",
    "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "legend.frameon": False, "font.family": "sans-serif",
}  # fmt: skip

Point = tuple[float, float]


def accuracy_chart(rows: Sequence[tuple[str, float, float]], marked: str | None, about: str) -> str:
    """A dot for each (name, mean, standard deviation) with a bar of one standard deviation to both sides, on an axis that spans
    what is drawn; ``marked`` is the name of the set that is recommended. ``about`` says what is shown."""
    with _styled(5.6, 0.55 + 0.27 * len(rows)) as (figure, axes):
        for place, (name, mean, std) in enumerate(rows):
            colour = COLOURS[0] if name == marked else COLOURS[7]
            axes.errorbar([mean], [place], xerr=[std], fmt="o", color=colour, capsize=3, markersize=6 if name == marked else 5)
        axes.set_yticks(range(len(rows)), [f"{name} ◂" if name == marked else name for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="x", color=INK, alpha=0.15)
        axes.set_xlabel("accuracy in %")
        return _svg(figure, about)


def loss_chart(points: Sequence[Point], about: str, window: int = 10) -> str:
    """Points (step, value) as a faint line, and the mean of the last ``window`` points as a strong one."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    means = [sum(ys[max(0, i - window + 1) : i + 1]) / len(ys[max(0, i - window + 1) : i + 1]) for i in range(len(ys))]
    with _styled(4.2, 1.9) as (figure, axes):
        axes.plot(xs, ys, color=COLOURS[7], alpha=0.5, linewidth=0.8)
        axes.plot(xs, means, color=COLOURS[0], linewidth=1.6, marker="o" if len(xs) == 1 else None)
        axes.set_xlabel("step")
        return _svg(figure, about)


def curve_chart(
    lines: Mapping[str, Sequence[Point]], about: str, across: str = "epoch", bands: Mapping[str, Sequence[float]] | None = None
) -> str:  # fmt: skip
    """A line of points (x, value) for each name; ``across`` says what x is. ``bands`` are standard deviations at the points of
    a line, drawn to both sides."""
    with _styled(5.2, 2.6) as (figure, axes):
        for number, (name, points) in enumerate(lines.items()):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)], "marker": "o"}
            axes.plot(xs, ys, label=name, markersize=3, linewidth=1.3, **style)
            if bands and (band := bands.get(name)):
                low, high = zip(*((y - std, y + std) for y, std in zip(ys, band, strict=True)), strict=True)
                axes.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_xlabel(across)
        handles = axes.lines  # named explicitly: Matplotlib leaves out names that begin with "_"
        axes.legend(handles, list(lines), loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _svg(figure, about)


@contextmanager
def _styled(width: float, height: float) -> Iterator[tuple[Figure, Any]]:
    """A figure of so many inches and its axes, in the style of the reports until it is drawn and saved."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        figure = new_figure(width, height)
        yield figure, figure.subplots()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. IPython is imported first, where it is installed: MLflow imports it in the thread that
    it logs from, and matplotlib fails if it finds it half imported."""
    with suppress(ImportError):
        import_module("IPython")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, about: str) -> str:
    """The figure as an SVG element with a name for those who do not see it, in the page's colour of text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return for_page(buffer.getvalue(), about).replace(INK, "currentColor")


def for_page(svg: str, about: str) -> str:
    """An SVG file of matplotlib as an element of a page: with a name, and without the names of groups, which would occur more
    than once in a page."""
    text = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])
    own = hashlib.sha256(text.encode()).hexdigest()[:8]  # equal markers of several charts have equal names
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>c{own}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(about, quote=True)}"', 1)
