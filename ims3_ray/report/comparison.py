"""The tables of a comparison: methods at equal numbers of images per class, their differences, and which of them are sure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from ims3_ray.config import CompareConfig
from ims3_ray.plan.layout import Plan
from ims3_ray.report.markdown import plain, table
from ims3_ray.report.ranking import rank, ranking_note
from ims3_ray.report.results import KINDS, Results, summary, summary_text

LEVEL = 0.05
"""The largest probability of calling any of a comparison's differences significant if none of them is real."""


def comparison_tables(plan: Plan[CompareConfig], results: Results) -> list[dict[str, Any]]:
    """One table per number of images per class and row, with a line per arm: its accuracies, the difference of its ``last``
    from that of the arm ``against``, the published accuracy, and the hash of each set."""
    config, tables = plan.config, list[dict[str, Any]]()
    for k in config.budgets:
        for row in config.evaluation.rows:
            lines: list[dict[str, Any]] = [_line(plan, results, arm, k, row) for arm in config.arms]
            base = next(line for line in lines if line["arm"] == config.base)
            for line in lines:
                line["difference"] = None if line is base else difference(line["last"], base["last"])
            published = any(line["published"] for line in lines)
            tables.append({"images_per_class": k, "row": row, "published": published, "lines": lines})
        tables += [_higher(config, k, student, tables) for student in _read_as_higher(config)]
    rank(config, tables)
    found: list[dict[str, Any]] = [line["difference"] for table in tables for line in table["lines"] if line["difference"]]
    for each, p in zip(found, holm([each["p"] for each in found]), strict=True):
        each["p_holm"] = p
    return tables


def _line(plan: Plan[CompareConfig], results: Results, arm: str, k: int, row: str) -> dict[str, Any]:
    names = [name for name, scored in plan.sets.items() if (scored.arm, scored.ipc) == (arm, k)]
    found = [results["sets"][name] for name in names]
    same = len({each["content"] for each in found}) == 1  # some methods choose the same images for all seeds
    distinct = found[:1] if same else found
    kinds = [kind for kind in KINDS if kind in found[0]["rows"][row]]
    return {
        "arm": arm, "title": found[0]["title"], "content": [each["content"] for each in distinct],
        **{kind: pooled([each["rows"][row][kind]["seeds"] for each in distinct]) for kind in kinds},
        "published": plan.config.published.get(arm, {}).get(row, {}).get(k),
    }  # fmt: skip


HIGHER = "higher/"
"""Prefix of the rows in which a publication reports, for each method, the higher of its accuracies by several protocols."""


def _read_as_higher(config: CompareConfig) -> list[str]:
    """The students of several protocols for which published figures are the higher of these."""
    students = [student for _, student in config.evaluation.rows.values()]
    rows = [row for of_arm in config.published.values() for row in of_arm if row.startswith(HIGHER)]
    found = dict.fromkeys(row.removeprefix(HIGHER) for row in rows)
    return [student for student in found if students.count(student) > 1]


def _higher(config: CompareConfig, k: int, student: str, tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table of a student in which each arm has the accuracies of the protocol that gives it the highest one."""
    rows = [row for row, (_, name) in config.evaluation.rows.items() if name == student]
    mine = [table for table in tables if table["images_per_class"] == k and table["row"] in rows]
    note, lines = f"For each method the higher of {' and '.join(rows)}, as the publication reads its results.", []
    for position, arm in enumerate(config.arms):
        best = max(mine, key=lambda table: table["lines"][position]["last"]["mean"])
        line = best["lines"][position]
        printed = config.published.get(arm, {}).get(HIGHER + student, {}).get(k)
        lines.append({**line, "title": f"{line['title']} ({best['row']})", "difference": None, "published": printed})
    return {"images_per_class": k, "row": HIGHER + student, "published": True, "note": note, "lines": lines}


def pooled(draws: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Mean and standard deviation over the students of all draws.

    If there are several draws, ``sets`` holds the mean accuracy of each, and the standard error is computed over these, because
    the students of one set are not independent of each other. ``count`` is the number of values behind the standard error.
    """
    whole = summary([value for students in draws for value in students])
    if len(draws) == 1:
        return {**whole, "count": len(whole["seeds"])}
    sets = [statistics.fmean(students) for students in draws]
    return {**whole, "sets": sets, "sem": statistics.stdev(sets) / math.sqrt(len(sets)), "count": len(sets)}


def difference(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The difference of two means with its standard error, and the probability ``p`` of one at least as large by chance
    (Welch's t-test, two-sided). Both are None if one of the means is of a single value.

    The two are taken as independent. Equal seeds make the error smaller, if anything.
    """
    mean = one["mean"] - other["mean"]
    if one["sem"] is None or other["sem"] is None:
        return {"mean": mean, "sem": None, "p": None}
    return {"mean": mean, "sem": math.hypot(one["sem"], other["sem"]), "p": _welch(mean, one, other)}


def _welch(mean: float, one: dict[str, Any], other: dict[str, Any]) -> float | None:
    """The p of a difference; None where equal values on both sides leave no error to compare it with."""
    from scipy.stats import t  # takes a second to import

    parts = [(each["sem"] ** 2, each["count"] - 1) for each in (one, other)]
    square = sum(part for part, _ in parts)
    if not square:
        return None if mean else 1.0
    freedom = square**2 / sum(part**2 / degrees for part, degrees in parts)
    return float(2 * t.sf(abs(mean) / math.sqrt(square), freedom))


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Holm's correction: the values by which a set of tests is judged, so that the probability of any false claim among them
    stays below the level. Tests without a value stay without one."""
    order = sorted((value, i) for i, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    highest = 0.0
    for place, (value, i) in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - place) * value))
        adjusted[i] = highest
    return adjusted


def significant(found: dict[str, Any]) -> bool:
    """Whether a difference is sure to :data:`LEVEL` after the correction for all differences of the comparison."""
    return found["p_holm"] is not None and found["p_holm"] < LEVEL


def accuracy_text(value: dict[str, Any] | None) -> str:
    """Mean ± standard error over sets, as in ``72.2 ± 0.4``; for a single set mean ± standard deviation over students."""
    if value and "sets" in value:
        return f"{value['mean']:.1f} ± {value['sem']:.1f}"
    return summary_text(value)


def explained(config: CompareConfig) -> str:
    """What ± and the mark of sure differences mean."""
    against = config.arms[config.base].title
    sure = (
        f"is marked if it is significant at {LEVEL:.0%} by Welch's t-test, with Holm's correction for all differences of the "
        "comparison"
    )
    if len(config.draws) > 1:
        return (
            "± is the standard error over the sets of all run seeds; where every seed gives the same set, students stand for "
            "sets, and ± is the standard deviation over them. The difference of a method's last accuracy from that of "
            f"{against} is ± its standard error; it {sure}."
        )
    return (
        "There is one set of images of each method, and ± is the standard deviation over its students. The difference of a "
        f"method's last accuracy from that of {against} is ± its standard error over students; it {sure}. Another set may "
        "differ by more."
    )


def markdown(config: CompareConfig, tables: Sequence[dict[str, Any]]) -> str:
    """The tables as Markdown, with the protocol, the seeds and the hash of every set."""
    several = "s" if len(config.draws) > 1 else ""
    parts = [
        f"# {config.name}", "",
        f"Top-1 accuracy in % on the real test split of {config.data.path}; student seeds {_listed(config.evaluation.seeds)}, "
        f"run seed{several} {_listed(config.draws)}. *last*: final epoch; *best*: best epoch on the test split itself; *val*: "
        f"best epoch on held-out training images. {explained(config)} The mark is bold type.",
        *([note] if (note := ranking_note(tables)) else []), "",
    ]  # fmt: skip
    for found in tables:
        parts += [f"## {found['images_per_class']} a class, {plain(found['row'])}", ""]
        if "note" in found:
            parts += [found["note"], ""]
        published = ["published"] if found["published"] else []
        ranked = ["HLR", "IOR", "LRS"] if any(line["ranking"] for line in found["lines"]) else []
        head = ["method", *KINDS, f"− {plain(config.arms[config.base].title)}", *published, *ranked, "sets"]
        rows = []
        for line in found["lines"]:
            cells = [plain(line["title"]), *(accuracy_text(line.get(kind)) for kind in KINDS), _difference(line["difference"])]
            cells += [line["published"] or ""] if found["published"] else []
            cells += ranking_cells(line["ranking"]) if ranked else []
            rows.append([*cells, " ".join(f"`{content}`" for content in line["content"])])
        parts += [*table(head, rows), ""]
    return "\n".join(parts)


def ranking_cells(scores: dict[str, float] | None) -> list[str]:
    """HLR, IOR and LRS of a line as text."""
    return ["", "", ""] if scores is None else [f"{scores['hlr']:.1f}", f"{scores['ior']:+.1f}", f"{scores['lrs']:.1f}"]


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
