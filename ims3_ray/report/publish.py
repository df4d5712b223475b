"""Writes the results of a finished job to its folder and to MLflow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch

from ims3_ray.config import CompareConfig, EvaluateConfig, RunConfig, canonical
from ims3_ray.data.contact_sheet import contact_sheet
from ims3_ray.engine.sets import read_set
from ims3_ray.engine.shards import pack_tensors
from ims3_ray.engine.stage import Context
from ims3_ray.io.storage import Storage
from ims3_ray.plan.arms import chosen_of
from ims3_ray.plan.layout import Config, Plan, Scored
from ims3_ray.report.card import dataset_card
from ims3_ray.report.comparison import comparison_tables, markdown
from ims3_ray.report.covered import covered
from ims3_ray.report.html import CONFUSED_CLASSES, SHEET_CLASSES, Table, render_comparison, render_evaluation, render_report
from ims3_ray.report.results import KINDS, Results
from ims3_ray.stages.evaluate import confusion
from ims3_ray.stages.export import unpack
from ims3_ray.tracking import DistilledSet, Tracker, slugs, table_of

SHEET_IMAGES = 10
"""Number of images per class on a contact sheet. A comparison shows the sets whose images per class are closest to this number;
a scored set shows its first images."""
CARD = "README.md"
COPIED_BYTES = 100e6
"""Size of the largest distilled set that MLflow is given a copy of; of a larger one it has the address and the hash."""


def publish(context: Context, plan: Plan[RunConfig], results: Results, tracker: Tracker) -> None:
    """Write the results of a distillation: ``distilled/``, ``contact_sheet.png``, ``report.html``, the MLflow run and, last,
    ``results.json``."""
    config, storage, name = plan.config, context.storage, plan.config.name
    k = config.selection.images_per_class
    sheets = {arm: _sheet(context, scored, k) for arm, scored in plan.sets.items()}
    files, distilled = dict[str, bytes](), None
    if plan.export is not None:
        folder, exported = f"{name}/distilled", results["sets"][results["exported"]["arm"]]
        unpack(context, plan.export, folder)
        files[f"distilled/{CARD}"] = dataset_card(config, plan.classes, results).encode()
        storage.write(f"{folder}/{CARD}", files[f"distilled/{CARD}"])
        files |= _small_set(storage, folder)
        distilled = DistilledSet(
            exported["content"], storage.address(folder), exported["images"], len(plan.classes.names)
        )  # fmt: skip
        storage.write(f"{name}/contact_sheet.png", sheets[results["exported"]["arm"]])
    tables = selection_tables(context, plan)
    shown = {key: scored.title for key, scored in plan.sets.items() if not scored.whole}
    report = render_report(
        config, plan.classes, results, sheets=sheets, confusions=_confusions(context, plan), losses=_losses(context, plan),
        tables=tables, covered=covered(context, plan, results, shown),
    )  # fmt: skip
    for arm, table in tables.items():
        tracker.metrics({f"s3/{arm}/objective": table["objective"], f"s3/{arm}/lower_bound": table["lower_bound"]})
        chosen = list(enumerate(table["groups"]))
        terms = {term: [table[term][c][g] for c, g in chosen] for term in ("proximity", "repulsion", "score")}
        files[f"s3/{arm}.json"] = table_of({"class": plan.classes.names, "subgroup": table["groups"], **terms})
    for measured, value in results.get("instability", {}).items():
        tracker.metrics({f"instability/{measured}": value["coefficient"]})
    files |= {f"contact_sheet_{arm}.png": sheet for arm, sheet in sheets.items()}
    params = {arm: {"arm": arm, **canonical(config.arms[arm])} for arm in plan.sets}
    _finish(context, plan, results, tracker, report, files, params, distilled)


def _small_set(storage: Storage, folder: str) -> dict[str, bytes]:
    """The Parquet files of the distilled set in ``folder`` as files for MLflow; none of a set larger than
    :data:`COPIED_BYTES`."""
    found = storage.files(f"{folder}/data")
    if sum(info.size for info in found.values()) > COPIED_BYTES:
        return {}
    return {f"distilled/data/{name}": storage.read(f"{folder}/data/{name}") for name in found}


def publish_scores(context: Context, plan: Plan[EvaluateConfig], results: Results, tracker: Tracker) -> None:
    """Write the results of scoring sets: ``report.html``, the MLflow run and, last, ``results.json``."""
    sheets = {title: _sheet(context, scored, SHEET_IMAGES) for title, scored in plan.sets.items()}
    confusions = _confusions(context, plan)
    report = render_evaluation(plan.config, plan.classes, results, sheets=sheets, confusions=confusions)
    _finish(context, plan, results, tracker, report, {}, {title: {"path": path} for title, path in plan.config.sets.items()})


def publish_comparison(context: Context, plan: Plan[CompareConfig], results: Results, tracker: Tracker) -> None:
    """Write the results of a comparison: ``table.md``, a contact sheet for each arm, ``map.svg`` if it is wanted,
    ``report.html``, the MLflow run and, last, ``results.json`` with the tables."""
    config = plan.config
    results["tables"] = comparison_tables(plan, results)
    files = {"table.md": markdown(config, results["tables"]).encode()}
    k = min(config.budgets, key=lambda k: abs(k - SHEET_IMAGES))
    chosen = {
        key: scored
        for key, scored in plan.sets.items()
        if (scored.draw, scored.ipc) == (config.draws[0], k) and not scored.whole
    }
    shown = {key: f"{scored.title}, {k} a class" for key, scored in chosen.items()}
    sheets = {shown[key]: _sheet(context, scored, k) for key, scored in chosen.items()}
    files |= {f"contact_sheet_{scored.arm}.png": sheets[shown[key]] for key, scored in chosen.items()}
    pictures = covered(context, plan, results, shown)
    if pictures is not None and pictures.map:
        files["map.svg"] = pictures.map.encode()
    for file, data in files.items():
        context.storage.write(f"{config.name}/{file}", data)
    report = render_comparison(config, plan.classes, results, sheets=sheets, covered=pictures)
    params = {
        name: {"arm": scored.arm, "images_per_class": scored.ipc, "draw": scored.draw, **canonical(config.arms[scored.arm])}
        for name, scored in plan.sets.items()
    }  # fmt: skip
    _finish(context, plan, results, tracker, report, files, params)


def _finish(
    context: Context, plan: Plan[Config], results: Results, tracker: Tracker, report: str, files: Mapping[str, bytes],
    params: Mapping[str, Mapping[str, Any]], distilled: DistilledSet | None = None,
) -> None:  # fmt: skip
    """Write the files that every kind of job has, and to MLflow a child run per set with its accuracies and the curves of its
    students."""
    storage, name = context.storage, plan.config.name
    storage.write(f"{name}/confusion.safetensors", pack_tensors(**_counts(context, plan)))
    storage.write(f"{name}/report.html", report.encode())
    for key, scored in plan.sets.items():
        found = results["sets"][key]
        covered = results.get("coverage", {}).get(key, {})
        metrics = {f"coverage/{name}": value for name, value in covered.items() if isinstance(value, float)}
        curves: dict[str, list[tuple[int, float]]] = {}
        if covered.get("reached"):
            curves["coverage/reached"] = [(int(count), share) for count, share in covered["reached"].items()]
        for row, stage in scored.rows.items():
            values = found["rows"][row]
            for kind in set(KINDS) & set(values):
                known = {m: values[kind][m] for m in ("mean", "std", "sem") if values[kind][m] is not None}
                metrics |= {f"{row}/{kind}_{m}": value for m, value in known.items()}
            units = (stage.manifest(context.storage) or {})["units"]
            for unit in stage.units:
                checks = units[unit]["curve"]
                for value in ("loss", "test", "val"):
                    points = [(check["epoch"], check[value]) for check in checks if check[value] is not None]
                    curves[f"{row}/{value}/{unit}"] = points
        tracker.child(_run_name(key, scored), {"content": found["content"], **params[key]}, metrics, curves)
    for (k, metric), values in _accuracies(plan, results).items():
        tracker.metrics({metric: statistics.fmean(values)}, step=k)
    _tell_losses(plan, storage, tracker)
    tracker.inputs(results["provenance"], plan.config.data.path, distilled)
    for file, data in {"report.html": report.encode(), **files}.items():
        tracker.file(file, data)
    tracker.finish("FINISHED")
    results["mlflow"] = tracker.entry
    storage.write_json(f"{name}/results.json", results)


def _tell_losses(plan: Plan[Config], storage: Storage, tracker: Tracker) -> None:
    """Log the losses of all trainings to MLflow. Steps that were logged during the run are skipped; the others belong to an
    earlier run, or the server could not be reached at the time."""
    for stage in plan.stages:
        for prefix, rows in stage.curves(storage).items():
            tracker.losses(rows, prefix)


def _accuracies(plan: Plan[Config], results: Results) -> dict[tuple[int, str], list[float]]:
    """(Images per class, ``accuracy/ROW/ARM``) → mean accuracy of the last epoch, in per cent, of each draw's set."""
    found: dict[tuple[int, str], list[float]] = {}
    named = dict(zip(plan.sets, slugs(list(plan.sets)), strict=True))
    for key, scored in plan.sets.items():
        for row, values in results["sets"][key]["rows"].items():
            metric = f"accuracy/{row.replace('/', '_')}/{scored.arm or named[key]}"
            found.setdefault((scored.ipc, metric), []).append(values["last"]["mean"])
    return found


def _run_name(key: str, scored: Scored) -> str:
    """The name of a set in MLflow: its title, then what follows the arm's name in the plan's key (images per class, draw)."""
    return scored.title.replace("+", "and") + key.removeprefix(scored.arm or key)


def _sheet(context: Context, scored: Scored, columns: int) -> bytes:
    """The first images of each class that the report shows, at most ``columns`` of a class, as a PNG file."""
    images, labels = read_set(scored.images.artifact(context.storage), SHEET_CLASSES)[:2]
    columns = min(columns, int(labels.bincount().min()))
    first = [(labels == position).nonzero()[:columns, 0] for position in labels.unique()]
    return contact_sheet(images[torch.cat(first)], columns)


def _counts(context: Context, plan: Plan[Config]) -> dict[str, torch.Tensor]:
    """``SET/ROW`` → confusion matrix of the final weights, summed over students, int64 [C, C]."""
    return {
        f"{name}/{row}": confusion(stage.artifact(context.storage), stage.units)
        for name, scored in plan.sets.items()
        for row, stage in scored.rows.items()
    }


def _confusions(context: Context, plan: Plan[Config]) -> dict[str, Table]:
    if len(plan.classes.names) > CONFUSED_CLASSES:
        return {}
    counts = _counts(context, plan)
    shares = {title: 100 * table / table.sum(dim=1, keepdim=True) for title, table in counts.items()}
    return {title: table.tolist() for title, table in shares.items()}


def _losses(context: Context, plan: Plan[RunConfig]) -> dict[str, list[dict[str, float]]]:
    """The losses at each step of each fine-tuning, averaged over class groups if there are several."""
    found = {}
    for stage in plan.stages:
        if groups := list(stage.curves(context.storage).values()):
            steps = range(max(map(len, groups)))
            at_step = [[rows[step] for rows in groups if step < len(rows)] for step in steps]
            found[stage.title] = [{key: statistics.fmean(row[key] for row in rows) for key in rows[0]} for rows in at_step]
    return found


def selection_tables(context: Context, plan: Plan[RunConfig]) -> dict[str, dict[str, Any]]:
    """Arm → the terms of the objective of every candidate subgroup, for arms whose selector looks at all classes."""
    tables = {}
    for name, scored in plan.sets.items():
        manifest = chosen_of(scored.images).manifest(context.storage) or {}
        if manifest.get("table"):
            tables[name] = manifest["table"]
    return tables
