"""A table or figure of the paper as this program makes it, beside the printed figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ims3_ray.config import CompareConfig, SweepConfig
from ims3_ray.config.paper import Reproduction
from ims3_ray.config.sweep import symbol
from ims3_ray.io.storage import Storage
from ims3_ray.plan.layout import Plan
from ims3_ray.plan.sweep import before
from ims3_ray.report.comparison import accuracy_text
from ims3_ray.report.markdown import plain, table
from ims3_ray.report.results import Results

SMALL = "These runs have stand-ins in place of data and weights: their accuracies and times mean nothing."
Minutes = Mapping[str, Mapping[str, float]]
"""Title of an arm → what was done → minutes."""


def markdown_of(
    reproduction: Reproduction, found: Mapping[str, Results], minutes: Mapping[str, Minutes] | None = None,
    figures: Sequence[str] = (),
) -> str:  # fmt: skip
    """Every accuracy of the runs beside the printed one, as Markdown. ``found`` holds the results of each run, and ``minutes``
    the times of those of which they are wanted. ``figures`` are names of files beside the table."""
    parts = [f"# {reproduction.name}: {reproduction.title}", "", *([SMALL, ""] if reproduction.small else [])]
    parts += [*(f"* {note}" for note in reproduction.notes), ""]
    for name, config in reproduction.runs.items():
        if minutes and name in minutes:
            parts += [f"## {name}", "", *_of_times(config, minutes[name], reproduction.minutes[name]), ""]
            continue
        parts += [f"## {name}", "", found[name]["metric"] + ".", ""]
        if isinstance(config, SweepConfig):
            parts += [*_of_sweep(config, found[name]), ""]
        else:
            parts += [*_of_comparison(found[name], compared=not reproduction.small), ""]
            parts += [*_pictures(config), ""] if reproduction.name.startswith("figure") else []
    parts += [f"![{reproduction.title}]({file})" for file in figures]
    return "\n".join(parts)


def _pictures(config: CompareConfig) -> list[str]:
    """Links to the pictures that the comparison has written to its folder: the map, if there is one, or the images."""
    folder = f"../../{config.name}"
    if config.stages.get("coverage", {}).get("map"):
        return [f"![t-SNE map of the features of real images and of the sets]({folder}/map.svg)"]
    return [f"![{arm.title}]({folder}/contact_sheet_{name}.png)" for name, arm in config.arms.items()]


def _of_times(config: CompareConfig | SweepConfig, found: Minutes, printed: Minutes) -> list[str]:
    columns = list(dict.fromkeys(column for of_arm in found.values() for column in of_arm))
    rows = []
    for name, arm in config.arms.items():
        title, ours, there = plain(arm.title), found[arm.title], printed.get(name, {})
        rows.append([title, *(f"{ours.get(column, 0.0):.1f}" for column in columns), f"{sum(ours.values()):.1f}"])
        cells = [f"{there[column]:g}" if column in there else "" for column in columns]
        rows.append([f"{title}, printed", *cells, f"{sum(there.values()):g}"])
    return table(["method", *columns, "in all"], rows)


def minutes_of(plan: Plan[CompareConfig], storage: Storage) -> dict[str, dict[str, float]]:
    """The minutes of the workers that every arm's set took: fine-tuning, sampling with all that follows it, and preparing real
    images, on which several arms may depend."""
    found: dict[str, dict[str, float]] = {}
    for scored in plan.sets.values():
        spent = found.setdefault(scored.title, {})
        for stage in [*before([scored.images]), scored.images]:
            kind = "fine-tuning" if stage.counted == "fine_tunes" else "sampling" if stage.belongs_to_arm else "preparation"
            seconds = (stage.manifest(storage) or {})["seconds"]
            spent[kind] = spent.get(kind, 0.0) + seconds / 60
    return found


def _of_comparison(results: Results, compared: bool) -> list[str]:
    """A line for each method, number of images per class and student; of the accuracies the one after the last epoch."""
    rows = []
    for budget in results["tables"]:
        for line in budget["lines"]:
            printed = line["published"]
            apart = f"{line['last']['mean'] - printed_mean(printed):+.1f}" if printed and compared else ""
            what = [budget["images_per_class"], plain(budget["row"]), plain(line["title"])]
            rows.append([*what, accuracy_text(line["last"]), printed or "", apart])
    return table(["images per class", "protocol/student", "method", "ours", "printed", "ours − printed"], rows)


def printed_mean(text: str) -> float:
    """The mean of a printed accuracy such as ``41.8 ± 0.3``."""
    return float(text.partition("±")[0])


def _of_sweep(config: SweepConfig, results: Results) -> list[str]:
    keys = list(config.values)
    rows = []
    for point in results["points"]:
        row = point["rows"].get(config.row, {})
        settings = ["all" if point["settings"][key] is None else point["settings"][key] for key in keys]
        rows.append([*settings, accuracy_text(row.get("last")), accuracy_text(row.get("held_out"))])
    return table([*map(symbol, keys), "test", "held out"], rows)


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
