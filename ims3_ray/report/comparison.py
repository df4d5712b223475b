"""The table of a comparison: methods at equal numbers of images per class, with the standard errors of their differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ims3_ray.config import CompareConfig
from ims3_ray.plan.layout import Plan
from ims3_ray.report.results import KINDS, Results, summary, summary_text


def comparison_tables(plan: Plan[CompareConfig], results: Results) -> list[dict[str, Any]]:
    """One table per number of images per class and row, with a line per arm: its accuracies, the difference of its ``last``
    from that of the arm ``against``, the published accuracy, and the hash of each set."""
    config, tables = plan.config, []
    for k in config.budgets:
        for row in config.evaluation.rows:
            lines = [_line(plan, results, arm, k, row) for arm in config.arms]
            base = next(line for line in lines if line["arm"] == config.base)
            for line in lines:
                line["difference"] = None if line is base else difference(line["last"], base["last"])
            published = any(line["published"] for line in lines)
            tables.append({"images_per_class": k, "row": row, "published": published, "lines": lines})
    return tables


def _line(plan: Plan[CompareConfig], results: Results, arm: str, k: int, row: str) -> dict[str, Any]:
    names = [name for name, scored in plan.sets.items() if (scored.arm, scored.ipc) == (arm, k)]
    found = [results["sets"][name] for name in names]
    distinct = list({each["content"]: each for each in found}.values())  # some methods choose the same images for all seeds
    kinds = [kind for kind in KINDS if kind in found[0]["rows"][row]]
    return {
        "arm": arm, "title": found[0]["title"], "content": [each["content"] for each in distinct],
        **{kind: pooled([each["rows"][row][kind]["seeds"] for each in distinct]) for kind in kinds},
        "published": plan.config.published.get(arm, {}).get(row, {}).get(k),
    }  # fmt: skip


def pooled(draws: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean and standard deviation over the students of all draws. If there are several draws, the standard error of the mean is
    computed over draws, because the students of one set are not independent of each other."""
    whole = summary([value for students in draws for value in students])
    if len(draws) > 1:
        whole["sem"] = statistics.stdev(statistics.fmean(students) for students in draws) / math.sqrt(len(draws))
    return whole


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The difference of two means, with its standard error as if the two were independent (equal seeds make it smaller, if
    anything). The error is None if one of the means is of a single value."""
    known = one["sem"] is not None and other["sem"] is not None
    sem = math.hypot(one["sem"], other["sem"]) if known else None
    return {"mean": one["mean"] - other["mean"], "sem": sem}


def significant(found: dict[str, Any]) -> bool:
    """Whether the absolute value of a difference exceeds twice its standard error."""
    return found["sem"] is not None and abs(found["mean"]) > 2 * found["sem"]


def markdown(config: CompareConfig, tables: Sequence[dict[str, Any]]) -> str:
    """The tables as Markdown, with the protocol, the seeds and the hash of every set."""
    against = config.arms[config.base].title
    several = len(config.draws) > 1
    parts = [
        f"# {config.name}", "",
        f"Top-1 accuracy in % on the real test split of {config.data.path}; student seeds {_listed(config.evaluation.seeds)}, "
        f"run seed{'s' if several else ''} {_listed(config.draws)}; ± is one standard deviation over all students. *last*: "
        "final epoch; *best*: best epoch on the test split itself; *val*: best epoch on held-out training images. Differences "
        f"from {against} are of *last*, ± their standard error, "
        + ("over sets of several run seeds." if several else "over students of one set each: another set may differ by more."),
        "",
    ]  # fmt: skip
    for table in tables:
        parts += [f"## {table['images_per_class']} a class, {table['row']}", ""]
        head = ["method", *KINDS, f"− {against}", *(["published"] if table["published"] else []), "sets"]
        parts += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for line in table["lines"]:
            cells = [line["title"], *(summary_text(line.get(kind)) for kind in KINDS), _difference(line["difference"])]
            cells += [line["published"] or ""] if table["published"] else []
            parts.append(f"| {' | '.join([*cells, ' '.join(f'`{content}`' for content in line['content'])])} |")
        parts.append("")
    return "\n".join(parts)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def difference_text(value: dict[str, Any] | None) -> str:
    """A difference as text, as in ``+1.2 ± 0.4``."""
    if value is None:
        return ""
    return f"{value['mean']:+.1f}" + ("" if value["sem"] is None else f" ± {value['sem']:.1f}")


def _difference(value: dict[str, Any] | None) -> str:
    """A difference as Markdown text, in bold if it is significant."""
    text = difference_text(value)
    return f"**{text}**" if value is not None and significant(value) else text
