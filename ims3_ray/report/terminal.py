"""The tables that jobs print when they end."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ims3_ray.config.sweep import title_of, trial_title
from ims3_ray.report.card import chosen_text
from ims3_ray.report.comparison import accuracy_text, difference_text
from ims3_ray.report.results import KINDS, RunResult, summary_text


def print_result(result: RunResult, console: Console | None = None) -> None:
    """Print a line per set and row with mean ± standard deviation, then the path of the report."""
    console = console or Console(highlight=False)
    sets = result.results["sets"].values()
    several = any(len(found["rows"]) > 1 for found in sets)
    table = _table("images", *(["protocol"] if several else []), *KINDS)
    for found in sets:
        for row, values in found["rows"].items():
            table.add_row(found["title"], *([row] if several else []), *(summary_text(values.get(kind)) for kind in KINDS))
    console.print(result.results["metric"], soft_wrap=True)
    console.print(table)
    if skipped := result.results["skipped_images"]:
        console.print(f"{len(skipped)} images could not be decoded and were left out; the report names them")
    if exported := result.results.get("exported"):
        title = result.results["sets"][exported["arm"]]["title"]
        console.print(f"exported to {result.folder}/distilled: {title}{chosen_text(result.results)}", soft_wrap=True)
    _print_end(result, console)


def _print_end(result: RunResult, console: Console) -> None:
    for line in result.results.get("estimate", {}).get("lines", []):
        console.print(line, soft_wrap=True)
    console.print(f"report: {result.report}", soft_wrap=True)
    if line := _mlflow(result):
        console.print(line, soft_wrap=True)


def _mlflow(result: RunResult) -> str:
    """Where MLflow shows the run; empty where MLflow has not taken it, and for results of an earlier version."""
    found = result.results.get("mlflow", {})
    if "page" not in found or not found["run"]:
        return ""
    if (uri := found["uri"] or f"sqlite:///{result.folder}/mlflow.db").startswith("http"):
        return f"MLflow: {uri.rstrip('/')}{found['page']}"
    return f"MLflow: mlflow ui --backend-store-uri {uri}; then http://127.0.0.1:5000{found['page']}"


def print_comparison(result: RunResult, console: Console | None = None) -> None:
    """Print a table per number of images per class and row, then the path of the report."""
    console = console or Console(highlight=False)
    console.print(result.results["metric"], soft_wrap=True)
    for found in result.results["tables"]:
        table = _table("method", *KINDS, "difference", *(["published"] if found["published"] else []))
        table.title = f"{found['images_per_class']} a class, {found['row']}"
        table.caption = found.get("note")
        for line in found["lines"]:
            cells = [line["title"], *(accuracy_text(line.get(kind)) for kind in KINDS), difference_text(line["difference"])]
            table.add_row(*cells, *([line["published"] or ""] if found["published"] else []))
        console.print(table)
    _print_end(result, console)


def print_sweep(result: RunResult, console: Console | None = None) -> None:
    """Print a line per trial, the counts of what was computed, the best point, and the paths of its config and of the
    report."""
    console, found = console or Console(highlight=False), result.results
    made = found["counts"]
    table = _table("trial", "status", "distinct selections", "best objective", "at")
    for trial in found["trials"]:
        best = {key: value for key, value in (trial["best"] or {}).items() if key not in trial["settings"]}
        objective = "" if trial["objective"] is None else f"{trial['objective']:.2f}"
        distinct = ", ".join(map(str, trial["selections"]))
        table.add_row(trial_title(trial["settings"]), trial["status"], distinct, objective, title_of(best))
    console.print(table)
    console.print(
        f"{made['points']:,} points; fine-tunes: {made['fine_tunes']}, pools: {made['pools']}, distinct selections: "
        f"{made['distinct_selections']}, of which evaluated: {made['evaluated']}, students: {made['students']}",
        soft_wrap=True,
    )
    console.print(found["metric"], soft_wrap=True)
    if best := found["best"]:
        rows = [
            f"{row}: held-out {accuracy_text(v.get('held_out'))}, test {accuracy_text(v['last'])}"
            for row, v in best["rows"].items()
        ]
        console.print("; ".join([f"best: {title_of(best['settings'])}", *rows]), soft_wrap=True)
        console.print(f"as a config: {result.folder}/best.yaml", soft_wrap=True)
    _print_end(result, console)


def _table(first: str, *columns: str) -> Table:
    table = Table()
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table
