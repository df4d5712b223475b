"""The reports: one HTML file each with everything inside, figures included."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from ims3_ray.comparison import difference_text, significant
from ims3_ray.config import CompareConfig, EvaluateConfig, RunConfig, SweepConfig, WorkConfig, canonical
from ims3_ray.config.sweep import title_of
from ims3_ray.data.classes import ClassTable
from ims3_ray.report.figures import curve_chart, line_chart
from ims3_ray.results import Results, spread_text

SHEET_CLASSES = 50
"""The images of so many classes are shown; browsers draw no pictures of tens of thousands of pixels."""
CONFUSED_CLASSES = 30
"""Tables of classes are shown for so many; ``confusion.safetensors`` has them for any number."""

SHOWN_SELECTIONS = 20
"""The best of a search are shown; ``points.csv`` has all points."""

TERM_TITLES = {
    "loss_diffusion": "L_Diff",
    "loss_variance": "variational bound",
    "loss_inversion_matching": "L_IM",
    "loss_inversion_matching_released": "L_IM (released reading)",
    "loss_representativeness": "representativeness",
    "loss_diversity": "diversity",
}

Table = list[list[float]]
"""Confusion in per cent of each class's images."""


def render_report(
    config: RunConfig, classes: ClassTable, results: Results, *, sheets: dict[str, bytes], confusions: dict[str, Table],
    losses: dict[str, list[dict[str, float]]], tables: dict[str, dict[str, Any]],
) -> str:  # fmt: skip
    """HTML of a distillation: ``sheets`` are PNGs by arm, ``losses`` the rows of ``losses.json`` by fine-tuning, ``tables`` the
    terms of S3 by arm."""
    charts = {
        f"{title}: {term}" if len(losses) > 1 else term: line_chart([(int(row["step"]), row[key]) for row in rows])
        for title, rows in losses.items()
        for key, term in TERM_TITLES.items()
        if rows and key in rows[0]
    }
    return _render(
        "report.html",
        config,
        classes,
        results,
        sheets=sheets,
        curves=_curves(results),
        confusions=confusions,
        charts=charts,
        tables=tables,
    )


def render_evaluation(
    config: EvaluateConfig, classes: ClassTable, results: Results, *, sheets: dict[str, bytes], confusions: dict[str, Table]
) -> str:  # fmt: skip
    """HTML of ``jobs/evaluate.py``."""
    return _render("evaluation.html", config, classes, results, sheets=sheets, curves=_curves(results), confusions=confusions)


def render_comparison(config: CompareConfig, classes: ClassTable, results: Results, *, sheets: dict[str, bytes]) -> str:
    """HTML of ``jobs/compare.py``."""
    return _render("comparison.html", config, classes, results, sheets=sheets)


def render_sweep(
    config: SweepConfig, classes: ClassTable, results: Results, figures: Mapping[str, Mapping[str, bytes]]
) -> str:  # fmt: skip
    """HTML of ``jobs/sweep.py``; ``figures`` by name and format."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}  # points that choose the same images
    for point in results["points"]:
        if point["objective"] is not None:
            alike.setdefault((point["trial"], point["objective"], point["score"], *point["content"]), []).append(point)
    ranked = sorted(alike.values(), key=lambda points: -points[0]["objective"])
    svgs = {name: forms["svg"].decode().partition("<svg")[2] for name, forms in figures.items()}
    return _render(
        "sweep.html", config, classes, results, figures={name: f"<svg{text}" for name, text in svgs.items()}, title=title_of,
        ranked=ranked[:SHOWN_SELECTIONS],
    )  # fmt: skip


def _render(template: str, config: WorkConfig, classes: ClassTable, results: Results, **more: Any) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=jinja2.PackageLoader("ims3_ray", "report")
    )
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    environment.filters |= {"exp": math.exp, "significant": significant, "difference": difference_text, "spread": spread_text}
    rows = [row for found in results["sets"].values() for row in found["rows"].values()]
    return environment.get_template(template).render(
        config=config, classes=classes, shown=classes.names[:SHEET_CLASSES], results=results,
        longest=max(stage["seconds"] for stage in results["stages"]) or 1,
        total=sum(stage["seconds"] for stage in results["stages"]),
        yaml=yaml.safe_dump(canonical(config), sort_keys=False),
        scores=max((row["last"]["mean"] for row in rows), default=1) or 1, **more,
    )  # fmt: skip


def _curves(results: Results) -> dict[str, str]:
    """Row → chart of the test accuracy of every set."""
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for found in results["sets"].values():
        for row, values in found["rows"].items():
            points = [(float(check["epoch"]), float(check["test"])) for check in values["curve"]]
            lines.setdefault(row, {})[found["title"]] = points
    return {row: curve_chart(sets) for row, sets in lines.items()}
