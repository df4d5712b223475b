"""What a finished run leaves in its folder, and in MLflow."""

from __future__ import annotations

import json
import statistics
from typing import Any

from ims3_ray.config import canonical
from ims3_ray.plan import Plan
from ims3_ray.report.card import dataset_card
from ims3_ray.report.html import SHEET_CLASSES, render_report
from ims3_ray.stages.adapters import Adapters
from ims3_ray.stages.base import Context, Stage
from ims3_ray.stages.export import contact_sheet, unpack
from ims3_ray.stages.select import read_chosen


def publish(context: Context, plan: Plan, results: dict[str, Any]) -> None:
    """Write ``distilled/``, ``contact_sheet.png``, ``report.html``, the MLflow run, and last ``results.json``."""
    config, storage, name = context.config, context.storage, context.config.name
    k = config.selection.images_per_class
    sheets = {arm: contact_sheet(_images(context, stage), k) for arm, stage in plan.evaluations.items()}
    unpack(context, plan.export.artifact(storage), f"{name}/distilled")
    card = dataset_card(config, plan.classes, results).encode()
    storage.write(f"{name}/distilled/README.md", card)
    storage.write(f"{name}/contact_sheet.png", sheets[config.export])
    losses = _losses(context, plan)
    report = render_report(config, plan.classes, results, sheets, losses, s3_tables(context, plan)).encode()
    storage.write(f"{name}/report.html", report)
    results["mlflow_run"] = context.tracker.run_id
    _track(context, plan, results, {"report.html": report, "README.md": card}, sheets)
    storage.write(f"{name}/results.json", json.dumps(results, indent=1).encode())


def _images(context: Context, evaluation: Stage) -> Any:
    """Of the classes that the report shows."""
    return read_chosen(evaluation.inputs["select"].artifact(context.storage), SHEET_CLASSES)[0]


def _losses(context: Context, plan: Plan) -> list[dict[str, float]]:
    """The rows of the fine-tuning's steps, the mean over class groups where there are several; none without one."""
    for stage in plan.stages:
        if stage.kind == "finetune":
            adapters = Adapters.of(stage, context.storage)
            groups = [adapters.losses(group) for group in range(len(adapters.groups))]
            steps = range(max(map(len, groups)))
            at_step = [[rows[step] for rows in groups if step < len(rows)] for step in steps]
            return [{key: statistics.fmean(row[key] for row in rows) for key in rows[0]} for rows in at_step]
    return []


def s3_tables(context: Context, plan: Plan) -> dict[str, dict[str, Any]]:
    """Arm → the terms of Eq. 10 of every candidate subgroup, for arms that selected by S3."""
    tables = {}
    for name, stage in plan.evaluations.items():
        manifest = stage.inputs["select"].manifest(context.storage) or {}
        if manifest.get("s3"):
            tables[name] = manifest["s3"]
    return tables


def _track(
    context: Context, plan: Plan, results: dict[str, Any], files: dict[str, bytes], sheets: dict[str, bytes]
) -> None:  # fmt: skip
    """What the stages have not logged while they ran: S3 terms, one child run per arm, files."""
    config, tracker = context.config, context.tracker
    for name, table in s3_tables(context, plan).items():
        tracker.metrics({f"s3/{name}/objective": table["objective"], f"s3/{name}/lower_bound": table["lower_bound"]})
        for position, group in enumerate(table["groups"]):
            terms = {term: table[term][position][group] for term in ("proximity", "repulsion", "score")}
            tracker.metrics({f"s3/{name}/{term}": value for term, value in terms.items()}, step=position)
    for name, value in results.get("instability", {}).items():
        tracker.metrics({f"instability/{name}": value["coefficient"]})
    for name, arm in results["arms"].items():
        stage = plan.evaluations[name]
        students = (stage.manifest(context.storage) or {})["units"]
        tracker.child(
            arm["title"].replace("+", "and"),
            {"arm": name, "content": arm["content"], **canonical(config.arms[name])},
            {"accuracy_last_mean": arm["mean"], "accuracy_last_std": arm["std"],
             "accuracy_best_mean": arm["best"]["mean"], "accuracy_best_std": arm["best"]["std"]},
            {f"accuracy/{unit}": students[unit]["curve"] for unit in stage.units},
        )  # fmt: skip
    for file, data in files.items():
        tracker.file(file, data)
    for name, sheet in sheets.items():
        tracker.file(f"contact_sheet_{name}.png", sheet)
