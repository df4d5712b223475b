"""Small figures as SVG text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 150, 52, 22
COLOURS = ("#0b6e99", "#d1730f", "#3a8a3a", "#a83232", "#7a5aa6", "#7a5230", "#c05a9e", "#5d6d77", "#9a9a1f", "#1f9a9a")


def line_chart(points: Sequence[tuple[float, float]], window: int = 10) -> str:
    """A chart of points (x, y): a grey line through every point, a coloured line of their running mean over ``window`` points,
    and axes whose ends are labelled."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    low, high = min(ys), max(ys)
    span_x, span_y = (xs[-1] - xs[0]) or 1, (high - low) or 1

    def place(x: float, y: float) -> str:
        px = LEFT + (x - xs[0]) / span_x * (WIDTH - LEFT - 8)
        py = 8 + (high - y) / span_y * (HEIGHT - BOTTOM - 8)
        return f"{px:.1f},{py:.1f}"

    means = [sum(ys[max(0, i - window + 1) : i + 1]) / len(ys[max(0, i - window + 1) : i + 1]) for i in range(len(ys))]
    raw = " ".join(place(x, y) for x, y in points)
    smooth = " ".join(place(x, y) for x, y in zip(xs, means, strict=True))
    floor = HEIGHT - BOTTOM
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img">'
        f'<path d="M{LEFT} 8V{floor}H{WIDTH - 8}" fill="none" stroke="#888"/>'
        f'<polyline points="{raw}" fill="none" stroke="#ccc"/>'
        f'<polyline points="{smooth}" fill="none" stroke="#0b6e99" stroke-width="2"/>'
        f'<text x="{LEFT - 6}" y="14" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">{xs[0]:g}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {xs[-1]:g}</text></svg>'
    )


def curve_chart(lines: Mapping[str, Sequence[tuple[float, float]]], across: str = "epoch") -> str:
    """A chart with a line of points (x, value) for each name, and a legend; ``across`` says what x is."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    low, high, first, last = min(ys), max(ys), min(xs), max(xs)
    height = HEIGHT + 14 * len(lines)
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">']
    floor = HEIGHT - BOTTOM
    parts.append(f'<path d="M{LEFT} 8V{floor}H{WIDTH - 8}" fill="none" stroke="#888"/>')
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [
            (
                LEFT + (x - first) / ((last - first) or 1) * (WIDTH - LEFT - 8),
                8 + (high - y) / ((high - low) or 1) * (floor - 8),
            )
            for x, y in points
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>' for x, y in placed]
        y = HEIGHT + 14 * number + 10
        parts.append(f'<rect x="{LEFT}" y="{y - 8}" width="10" height="8" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + 16}" y="{y}">{escape(name)}</text>')
    parts += [
        f'<text x="{LEFT - 6}" y="14" text-anchor="end">{high:.1f}</text>',
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">{low:.1f}</text>',
        f'<text x="{LEFT}" y="{HEIGHT - 8}">{first:g}</text>',
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 8}" text-anchor="end">{across} {last:g}</text></svg>',
    ]
    return "".join(parts)
