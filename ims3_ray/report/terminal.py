"""The table that a run ends with."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ims3_ray.pipeline import DistillResult


def print_result(result: DistillResult, console: Console | None = None) -> None:
    """Arms with mean ± std, then where the report lies."""
    console = console or Console(highlight=False)
    table = Table()
    for column in ("images", "last epoch", "best epoch"):
        table.add_column(column, justify="left" if column == "images" else "right")
    for arm in result.results["arms"].values():
        best = arm["best"]
        table.add_row(arm["title"], f"{arm['mean']:.1f} ± {arm['std']:.1f}", f"{best['mean']:.1f} ± {best['std']:.1f}")
    console.print(result.results["metric"])
    console.print(table)
    if skipped := result.results["skipped_images"]:
        console.print(f"{len(skipped)} images could not be decoded and were left out; the report names them")
    console.print(f"report: {result.report}", soft_wrap=True)
