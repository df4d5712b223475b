"""Publishes a search: best configuration, figures, a table of all points, the report, child runs in MLflow."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ims3_ray.config import SweepConfig
from ims3_ray.config.loading import as_yaml
from ims3_ray.config.sweep import Range, Settings, symbol, title_of, trial_title
from ims3_ray.io.storage import Storage
from ims3_ray.plan.sweep import SweepPlan
from ims3_ray.report.html import render_sweep
from ims3_ray.report.plots import FORMATS, curves, heat_map, scatter
from ims3_ray.report.results import Results
from ims3_ray.search.records import FINISHED, Point, Tried, points_of
from ims3_ray.tracking import Tracker, slug

WEIGHTS = ("selection.alpha", "selection.beta")
FIGURE_NAMES = {"λ_IM": "lambda_im", "α": "alpha", "β": "beta", "φ": "phi"}

Figures = dict[str, dict[str, bytes]]
"""Name of a figure → format → content of the file."""


def publish_sweep(plan: SweepPlan, results: Results, storage: Storage, tracker: Tracker) -> None:
    """Write ``best.yaml``, ``figures/``, ``points.csv``, ``points.parquet`` and ``report.html``, finish the MLflow run, and
    write ``results.json`` last."""
    config, name = plan.config, plan.config.name
    figures = figures_of(config, results)
    table = table_of(config, results["points"])
    files = {"points.csv": _csv(table), "points.parquet": _parquet(table)}
    if results["best"]:
        files["best.yaml"] = best_yaml(config, results).encode()
    files["report.html"] = render_sweep(config, plan.classes, results, figures).encode()
    for figure, forms in figures.items():
        files |= {f"figures/{figure}.{form}": forms[form] for form in FORMATS}
    for file, data in files.items():
        storage.write(f"{name}/{file}", data)
        tracker.file(file.rpartition("/")[2], data)
    tracker.metrics({f"count/{what}": float(value) for what, value in results["counts"].items()})
    if results["best"]:
        tracker.metrics({f"best/{metric}": value for metric, value in metrics_of(results["best"]).items()})
    tracker.finish("FINISHED")
    results["mlflow"] = tracker.entry
    storage.write_json(f"{name}/results.json", results)


def tell(plan: SweepPlan, tried: Tried, tracker: Tracker) -> None:
    """Log a child run per point of a trial, or one that says why the trial failed."""
    whole = trial_title(tried.settings)
    if tried.error:
        tracker.child(whole, tried.settings, {}, {}, failed=tried.error)
    else:
        tracker.forget_failure(whole)  # of an earlier attempt
    for point in points_of(plan.config, tried):
        params = {**point["settings"], "trial": point["trial"], "content": " ".join(map(str, point["content"]))}
        tracker.child(title_of(point["settings"]), params, metrics_of(point), {})


def metrics_of(point: Point) -> dict[str, float]:
    """A point's values under names that MLflow accepts, rounded to 4 decimal places."""
    found = {name: point[name] for name in ("objective", "score", "proximity", "repulsion") if point[name] is not None}
    for row, kinds in point["rows"].items():
        for kind, value in kinds.items():
            found |= {f"{row}/{kind}_{m}": value[m] for m in ("mean", "std", "sem") if value[m] is not None}
    return {name: round(value, 4) for name, value in found.items()}


def best_yaml(config: SweepConfig, results: Results) -> str:
    """The best point as a config that ``ims3 distill`` takes."""
    best = results["best"]
    found = config.at(best["settings"], config.draws[0])
    alone = {"name": f"{config.name}-best", "arms": {config.arm: found.arms[config.arm]}}
    found = found.model_copy(update=alone | {"instability": found.instability.model_copy(update={"images": 0})})
    head = [
        f"# The best of {results['counts']['points']} points of the search '{config.name}': {title_of(best['settings'])}.",
        f"# {results['metric'][0].upper()}{results['metric'][1:]}.",
    ]
    return "\n".join(head) + "\n" + as_yaml(found)


# Tables


def table_of(config: SweepConfig, points: Sequence[Point]) -> list[dict[str, Any]]:
    """One flat row per point."""
    return [
        {
            **point["settings"], "trial": point["trial"], "draws": point["draws"],
            "content": " ".join(str(c) for c in point["content"] if c), **metrics_of(point),
        }
        for point in points
    ]  # fmt: skip


def _columns(table: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in table for name in row))


def _csv(table: Sequence[Mapping[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, _columns(table), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def _parquet(table: Sequence[Mapping[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    columns = _columns(table)
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in columns} for row in table]), sink)
    return bytes(sink.getvalue())


# Figures


def figures_of(config: SweepConfig, results: Results) -> Figures:
    """The α–β heat map (Fig. 3 of the paper) and a curve for every other setting (λ_IM: Fig. 5, G: Fig. 6, K_i: Fig. 4), with
    all others at their best values; a scatter plot of the trials for a setting that is drawn from a range."""
    best = results["best"]
    if best is None:
        return {}
    found, values = {}, config.values
    points = [point for point in results["points"] if point["draws"] == len(config.draws)]
    lists = {key: each for key, each in values.items() if isinstance(each, list) and len(each) > 1}
    mapped = WEIGHTS if all(key in lists for key in WEIGHTS) else ()
    if mapped:
        found["alpha-beta"] = _weights(config, points, best["settings"])
    for key, drawn in values.items():
        near = list(_along(points, best["settings"], key)) if key in lists else []
        whole = [trial for trial in results["trials"] if trial["status"] == FINISHED and trial["objective"] is not None]
        trials = [(trial["settings"].get(key), trial["objective"]) for trial in whole]
        numbers = [(x, value) for x, value in trials if isinstance(x, int | float)]
        if key in mapped or (key not in lists and isinstance(drawn, list)):
            continue
        if len(near) > 1:
            found[_figure_name(key)] = _curve(config, near, key, lists[key], best)
        elif len(numbers) > 1:
            log = isinstance(drawn, Range) and drawn.log
            found[_figure_name(key)] = scatter(numbers, symbol(key), _objective_title(config), log)
    return found


def _figure_name(key: str) -> str:
    return FIGURE_NAMES.get(symbol(key), slug(symbol(key)))


def _objective_title(config: SweepConfig) -> str:
    return "−Eq. 10 per class" if not config.search.trains_students else "held-out accuracy (%)"


def _along(points: Sequence[Point], best: Settings, key: str) -> Iterator[Point]:
    """The points that differ from the best in ``key`` alone."""
    for point in points:
        others = {name: value for name, value in point["settings"].items() if name != key}
        if point["objective"] is not None and others == {name: value for name, value in best.items() if name != key}:
            yield point


def _curve(config: SweepConfig, near: Sequence[Point], key: str, order: Sequence[Any], best: Point) -> dict[str, bytes]:
    near = sorted(near, key=lambda point: order.index(point["settings"][key]))
    rows = [point["rows"].get(config.row, {}) for point in near]
    lines = []
    if not config.search.trains_students:
        lines.append((_objective_title(config), [point["objective"] for point in near], [0.0] * len(near)))
    else:
        for name, kind in (("held-out images (decides)", "held_out"), ("test split", "last")):
            lines.append((name, [row[kind]["mean"] for row in rows], [row[kind]["std"] for row in rows]))
    places = ["all" if point["settings"][key] is None else f"{point['settings'][key]}" for point in near]
    at = [point["settings"][key] for point in near].index(best["settings"][key])
    return curves(places, lines, symbol(key), "accuracy (%)" if config.search.trains_students else lines[0][0], at)


def _weights(config: SweepConfig, points: Sequence[Point], best: Settings) -> dict[str, bytes]:
    alphas, betas = (sorted(config.values[key]) for key in WEIGHTS)
    near, deviations = {}, [0.0]
    for point in points:
        mine = point["settings"]
        if all(mine[key] == best[key] for key in mine if key not in WEIGHTS):
            near[tuple(mine[key] for key in WEIGHTS)] = point["objective"]
            if config.search.trains_students and (students := point["rows"].get(config.row)):
                deviations.append(students["held_out"]["std"])
    values = [[near.get((a, b)) for b in betas] for a in alphas]
    known = [[float("nan") if value is None else value for value in line] for line in values]
    place = (alphas.index(best[WEIGHTS[0]]), betas.index(best[WEIGHTS[1]]))
    titles = ("α (nearness to the real centroid)", "β (distance from other classes)", _objective_title(config))
    noise = statistics.median(deviations)
    return heat_map([f"{a:g}" for a in alphas], [f"{b:g}" for b in betas], known, titles, place, noise)
