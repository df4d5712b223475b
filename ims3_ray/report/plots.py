"""Plots of a search as matplotlib figures: the α–β heat map, curves over one setting, and the trials of a setting with a
range."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ims3_ray.report.figures import DASHES, new_figure

FORMATS = ("png", "svg")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "ims3-ray",
    "text.parse_math": False,
}


def heat_map(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float]], titles: tuple[str, str, str],
    best: tuple[int, int], deviation: float = 0.0,
) -> dict[str, bytes]:  # fmt: skip
    """A heat map of ``values`` by row and column (NaN for none), with a frame around the best; ``titles`` are those of rows,
    columns and values. The colours span at least two of the values' standard deviations ``deviation`` to both sides of the
    middle, so that differences which are noise look alike."""
    with rc_context(STYLE):
        figure = new_figure(1.6 + 0.55 * len(columns), 1.1 + 0.42 * len(rows))
        axes = figure.subplots()
        known = [value for line in values for value in line if value == value]
        middle = (min(known) + max(known)) / 2
        half = max((max(known) - min(known)) / 2, 2 * deviation) or None
        span = (None, None) if half is None else (middle - half, middle + half)
        image = axes.imshow(values, cmap="viridis", aspect="auto", vmin=span[0], vmax=span[1])
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.set_ylabel(titles[0])
        axes.set_xlabel(titles[1])
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                if value == value:
                    dark = value < middle
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.add_patch(Rectangle((best[1] - 0.5, best[0] - 0.5), 1, 1, fill=False, edgecolor="#d1730f", linewidth=2.5))
        figure.colorbar(image, label=titles[2])
        return _saved(figure)


def curves(
    places: Sequence[str],
    lines: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    x_title: str,
    y_title: str,
    best: int | None = None,
) -> dict[str, bytes]:
    """Lines of (name, means, deviations) over evenly spaced ``places``; the band is one standard deviation, and an upright line
    marks the place ``best``."""
    with rc_context(STYLE):
        figure = new_figure(4.2, 2.8)
        axes = figure.subplots()
        handles: list[Any] = []
        for number, (_, means, deviations) in enumerate(lines):
            style = DASHES[number % len(DASHES)]
            (line,) = axes.plot(range(len(places)), means, marker="o", linestyle=style)
            handles.append(line)
            low, high = zip(*((m - d, m + d) for m, d in zip(means, deviations, strict=True)), strict=True)
            axes.fill_between(range(len(places)), low, high, alpha=0.15, color=line.get_color())
        if best is not None:
            axes.axvline(best, color="#d1730f", linewidth=0.8)
        axes.set_xticks(range(len(places)), places)
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        axes.legend(handles, [name for name, *_ in lines], frameon=False)  # also names that begin with "_"
        return _saved(figure)


def scatter(points: Sequence[tuple[float, float]], x_title: str, y_title: str, log: bool) -> dict[str, bytes]:
    """A scatter plot of points (value of a setting, best objective of the trial), for settings that are drawn from a range."""
    with rc_context(STYLE):
        figure = new_figure(4.2, 2.8)
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), marker="o", linestyle="", color="#0b6e99")
        if log:
            axes.set_xscale("log")
        axes.set_xlabel(x_title)
        axes.set_ylabel(y_title)
        return _saved(figure)


MARKERS = "o^sDvP*X<>"
"""Markers of classes, which can be told apart without colour."""


def maps(
    panels: Mapping[str, Mapping[int, Sequence[Sequence[float]]]], background: Sequence[Sequence[float]], classes: Sequence[str]
) -> dict[str, bytes]:
    """A panel for each set with the places (x, y) of its images by class, over the places of real images in grey."""
    across = min(3, len(panels))
    with rc_context(STYLE):
        down = -(-len(panels) // across)
        figure = new_figure(3.2 * across + 1.2, 3.0 * down)
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        handles: dict[str, Any] = {}
        for axes, (title, of_class) in zip(grid.flat, panels.items(), strict=False):
            axes.scatter(*zip(*background, strict=True), s=3, color="#d0d0d0", linewidths=0, rasterized=True)
            for position, points in of_class.items():
                marker = MARKERS[position % len(MARKERS)]
                points_drawn = axes.scatter(*zip(*points, strict=True), s=14, marker=marker, linewidths=0)
                handles.setdefault(classes[position], points_drawn)
            axes.set_title(title)
        figure.legend(list(handles.values()), list(handles), loc="outside right upper", frameon=False, fontsize=7)
        return _saved(figure)


def _saved(figure: Figure) -> dict[str, bytes]:
    found = {}
    for form in FORMATS:
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
        found[form] = buffer.getvalue()
    return found
