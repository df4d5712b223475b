"""Small figures as SVG text."""

from __future__ import annotations

from collections.abc import Sequence

WIDTH, HEIGHT, LEFT, BOTTOM = 420, 150, 52, 22


def line_chart(points: Sequence[tuple[float, float]], window: int = 10) -> str:
    """A line of (x, y): every point in grey, their running mean over ``window`` in colour, axes with their ends named."""
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
