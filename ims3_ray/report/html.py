"""The reports: each is one HTML file that contains everything, including its figures."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from ims3_ray.config import CompareConfig, EvaluateConfig, RunConfig, SweepConfig, WorkConfig, canonical
from ims3_ray.config.sweep import title_of
from ims3_ray.data.classes import ClassTable
from ims3_ray.objectives.base import Objective
from ims3_ray.provenance import described
from ims3_ray.report.comparison import accuracy_text, difference_text, explained, ranking_cells, significant
from ims3_ray.report.covered import Covered
from ims3_ray.report.figures import accuracy_chart, curve_chart, for_page, loss_chart
from ims3_ray.report.ranking import ranking_note
from ims3_ray.report.results import Results, summary_text

SHEET_CLASSES = 50
"""Largest number of classes whose images are shown: browsers do not draw pictures that are tens of thousands of pixels high."""
CONFUSED_CLASSES = 30
"""Largest number of classes for which confusion tables are shown; ``confusion.safetensors`` has them for any number."""

SHOWN_SELECTIONS = 20
"""Number of the best selections of a search that are shown; ``points.csv`` has all points."""

Table = list[list[float]]
"""A confusion table, in per cent of the images of each class."""


def render_report(
    config: RunConfig, classes: ClassTable, results: Results, *, sheets: dict[str, bytes], confusions: dict[str, Table],
    losses: dict[str, list[dict[str, float]]], tables: dict[str, dict[str, Any]], covered: Covered | None = None,
) -> str:  # fmt: skip
    """The HTML of a distillation's report: ``sheets`` are PNGs by arm, ``losses`` the rows of ``losses.json`` by fine-tuning,
    ``tables`` the terms of S3 by arm."""
    charts = {
        name: loss_chart([(int(row["step"]), row[key]) for row in rows], f"{name} over the steps of fine-tuning")
        for title, rows in losses.items()
        for key, term in _terms_of(rows)
        for name in [f"{title}: {term}" if len(losses) > 1 else term]
    }
    return _render(
        "report.html",
        config,
        classes,
        results,
        sheets=sheets,
        accuracies=_accuracies(results),
        curves=_curves(results),
        confusions=confusions,
        charts=charts,
        tables=_by_titles(tables, results),
        covered=covered,
    )


def render_evaluation(
    config: EvaluateConfig, classes: ClassTable, results: Results, *, sheets: dict[str, bytes], confusions: dict[str, Table]
) -> str:  # fmt: skip
    """The HTML of the report of ``ims3 evaluate``."""
    return _render(
        "evaluation.html", config, classes, results, sheets=sheets, accuracies=_accuracies(results), curves=_curves(results),
        confusions=confusions,
    )  # fmt: skip


def render_comparison(
    config: CompareConfig, classes: ClassTable, results: Results, *, sheets: dict[str, bytes], covered: Covered | None = None
) -> str:  # fmt: skip
    """The HTML of the report of ``ims3 compare``."""
    return _render(
        "comparison.html", config, classes, results, sheets=sheets, explained=explained(config), covered=covered,
        ranking_note=ranking_note(results["tables"]), charts=list(map(_compared, results["tables"])),
    )  # fmt: skip


def render_sweep(
    config: SweepConfig, classes: ClassTable, results: Results, figures: Mapping[str, Mapping[str, bytes]]
) -> str:  # fmt: skip
    """The HTML of the report of ``ims3 sweep``; ``figures`` are by name and format."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}  # points that choose the same images
    for point in results["points"]:
        if point["objective"] is not None and point["draws"] == len(config.draws):
            alike.setdefault((point["trial"], point["objective"], point["score"], *point["content"]), []).append(point)
    ranked = sorted(alike.values(), key=lambda points: -points[0]["objective"])
    svgs = {name: for_page(forms["svg"].decode(), f"{name} of the search") for name, forms in figures.items()}
    return _render(
        "sweep.html", config, classes, results, figures=svgs, title=title_of, ranked=ranked[:SHOWN_SELECTIONS]
    )  # fmt: skip


def _compared(table: Mapping[str, Any]) -> str:
    """Chart of the last accuracies of a table of a comparison, with what ± is in it."""
    found = [(line["title"], line["last"]) for line in table["lines"]]
    rows = [(title, value["mean"], value["sem"] if "sets" in value else value["std"]) for title, value in found]
    about = f"Accuracy of each method at {table['images_per_class']} images a class with {table['row']}"
    return accuracy_chart(rows, None, about)


def _terms_of(rows: list[dict[str, float]]) -> list[tuple[str, str]]:
    """Key and title of each term of the loss in the rows of a training."""
    titles = {name: title for objective in Objective.registry.values() for name, title in objective.term_titles.items()}
    keys = [key for key in (rows[0] if rows else {}) if key.startswith("loss_")]
    return [(key, titles.get(key.removeprefix("loss_"), key.removeprefix("loss_"))) for key in keys]


def _render(template: str, config: WorkConfig, classes: ClassTable, results: Results, **more: Any) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=jinja2.PackageLoader("ims3_ray", "report")
    )
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    environment.filters |= {"exp": math.exp, "significant": significant, "difference": difference_text, "spread": summary_text}
    environment.filters |= {"accuracy": accuracy_text, "ranking": ranking_cells}
    environment.filters["provenance"] = described
    return environment.get_template(template).render(
        config=config, classes=classes, shown=classes.names[:SHEET_CLASSES], results=results,
        longest=max(stage["seconds"] for stage in results["stages"]) or 1,
        yaml=yaml.safe_dump(canonical(config), sort_keys=False),
        held_out=config.evaluation.held_out(len(classes.names)), **more,
    )  # fmt: skip


def _by_titles(tables: Mapping[str, dict[str, Any]], results: Results) -> dict[str, dict[str, Any]]:
    """The terms of S3 by the titles of the arms; arms of which the selection is the same share an entry."""
    shared: list[tuple[list[str], dict[str, Any]]] = []
    for arm, table in tables.items():
        same = next((names for names, other in shared if other == table), None)
        if same is None:
            shared.append((same := [], table))
        same.append(results["sets"][arm]["title"])
    return {", ".join(names): table for names, table in shared}


def _accuracies(results: Results) -> dict[str, str]:
    """Row → chart of the accuracy of every set after the last epoch."""
    exported = (results.get("exported") or {}).get("arm")
    rows: dict[str, list[tuple[str, float, float]]] = {}
    for found in results["sets"].values():
        for row, values in found["rows"].items():
            rows.setdefault(row, []).append((found["title"], values["last"]["mean"], values["last"]["std"]))
    marked = results["sets"][exported]["title"] if exported in results["sets"] else None
    return {row: accuracy_chart(sets, marked, f"Accuracy of each set with {row}") for row, sets in rows.items()}


def _curves(results: Results) -> dict[str, str]:
    """Row → chart of the test accuracy of every set over the epochs; none where students were tested only at their end."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    bands: dict[str, dict[str, list[float]]] = {}
    for found in results["sets"].values():
        for row, values in found["rows"].items():
            if len(values["curve"]) > 1:
                points = [(float(check["epoch"]), float(check["test"])) for check in values["curve"]]
                lines.setdefault(row, {})[found["title"]] = points
                bands.setdefault(row, {})[found["title"]] = [float(check.get("std", 0.0)) for check in values["curve"]]
    return {row: curve_chart(sets, f"Test accuracy over epochs with {row}", bands=bands[row]) for row, sets in lines.items()}
