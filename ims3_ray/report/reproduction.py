"""A table or figure of the paper as this program makes it, beside the printed figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ims3_ray.config import CompareConfig, SweepConfig
from ims3_ray.config.paper import Reproduction
from ims3_ray.config.sweep import symbol
from ims3_ray.report.comparison import accuracy_text
from ims3_ray.report.results import Results


def markdown_of(reproduction: Reproduction, found: Mapping[str, Results]) -> str:
    """Every accuracy of the runs beside the printed one, as Markdown. ``found`` holds the results of each run."""
    parts = [f"# {reproduction.name}: {reproduction.title}", "", *(f"* {note}" for note in reproduction.notes), ""]
    for name, config in reproduction.runs.items():
        parts += [f"## {name}", "", found[name]["metric"] + ".", ""]
        lines = _of_sweep(config, found[name]) if isinstance(config, SweepConfig) else _of_comparison(config, found[name])
        parts += [*lines, ""]
    return "\n".join(parts)


def _of_comparison(config: CompareConfig, results: Results) -> list[str]:
    """A line for each method, number of images per class and student; of the accuracies the one after the last epoch."""
    lines = ["| images per class | protocol/student | method | ours | printed | ours − printed |", "|---|---|---|---|---|---|"]
    for table in results["tables"]:
        for line in table["lines"]:
            printed = line["published"]
            apart = "" if printed is None else f"{line['last']['mean'] - printed_mean(printed):+.1f}"
            cells = [table["images_per_class"], table["row"], line["title"], accuracy_text(line["last"]), printed or "", apart]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def printed_mean(text: str) -> float:
    """The mean of a printed accuracy such as ``41.8 ± 0.3``."""
    return float(text.partition("±")[0])


def _of_sweep(config: SweepConfig, results: Results) -> list[str]:
    keys = list(config.values)
    head = [*map(symbol, keys), "test", "held out"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for point in results["points"]:
        row = point["rows"].get(config.row, {})
        settings = ["all" if point["settings"][key] is None else point["settings"][key] for key in keys]
        lines.append(
            f"| {' | '.join(map(str, [*settings, accuracy_text(row.get('last')), accuracy_text(row.get('held_out'))]))} |"
        )
    return lines


def figures_of(reproduction: Reproduction, found: Mapping[str, Results]) -> dict[str, bytes]:
    """File name → figure, for searches over one setting: its curve in every run, in one figure."""
    runs = {name: config for name, config in reproduction.runs.items() if isinstance(config, SweepConfig)}
    keys = {key for config in runs.values() for key in config.values}
    if len(keys) != 1:
        return {}
    from ims3_ray.report.plots import curves  # imports matplotlib

    (key,) = keys
    lines, places = [], list[str]()
    for name, config in runs.items():
        points = sorted(found[name]["points"], key=lambda point: list(config.values[key]).index(point["settings"][key]))
        rows = [point["rows"][config.row]["last"] for point in points if point["rows"]]
        if len(rows) == len(points):
            places = [_place(point["settings"][key]) for point in points]
            title = f"{config.selection.images_per_class} images a class"
            lines.append((title, [row["mean"] for row in rows], [row["std"] for row in rows]))
    if not lines:
        return {}
    drawn = curves(places, lines, symbol(key), "accuracy on the test split (%)")
    return {f"{reproduction.name}.{form}": data for form, data in drawn.items()}


def _place(value: Any) -> str:
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
