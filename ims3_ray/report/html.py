"""The report: one HTML file with everything inside, figures included."""

from __future__ import annotations

import base64
import math
from importlib import resources
from typing import Any

import jinja2
import yaml

from ims3_ray.config import RunConfig, canonical
from ims3_ray.data.classes import ClassTable
from ims3_ray.report.figures import line_chart

SHEET_CLASSES = 50
"""The images of so many classes are shown; browsers draw no pictures of tens of thousands of pixels."""

TERM_TITLES = {
    "loss_diffusion": "L_Diff",
    "loss_variance": "variational bound",
    "loss_inversion_matching": "L_IM",
    "loss_inversion_matching_released": "L_IM (released reading)",
    "loss_representativeness": "representativeness",
    "loss_diversity": "diversity",
}


def render_report(
    config: RunConfig,
    classes: ClassTable,
    results: dict[str, Any],
    sheets: dict[str, bytes],
    losses: list[dict[str, float]],
    tables: dict[str, dict[str, Any]],
) -> str:
    """HTML of ``report.html``: ``sheets`` are PNGs by arm, ``losses`` the rows of ``losses.json``, ``tables`` S3 terms."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["data_uri"] = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    environment.filters["exp"] = math.exp
    template = environment.from_string((resources.files("ims3_ray.report") / "report.html").read_text())
    charts = {
        title: line_chart([(int(row["step"]), row[key]) for row in losses])
        for key, title in TERM_TITLES.items()
        if losses and key in losses[0]
    }
    longest = max(stage["seconds"] for stage in results["stages"]) or 1
    return template.render(
        config=config, classes=classes, shown=classes.names[:SHEET_CLASSES], results=results, sheets=sheets, charts=charts,
        tables=tables, longest=longest,
        total=sum(stage["seconds"] for stage in results["stages"]),
        yaml=yaml.safe_dump(canonical(config), sort_keys=False),
        scores=max((arm["mean"] + arm["std"] for arm in results["arms"].values()), default=1) or 1,
    )  # fmt: skip
