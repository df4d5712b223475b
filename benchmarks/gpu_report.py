"""Tables that compare the results of ``benchmarks/gpu.py`` with predictions, and the page of the docs that shows them."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
"""``--report`` writes the text between these lines of the page."""

PREDICTED: dict[tuple[str, str], str] = {
    ("machine", "bf16"): "790 TFLOP/s",
    ("machine", "fp32"): "50 TFLOP/s",
    ("machine", "tf32"): "400 TFLOP/s",
    ("machine", "copy"): "2,900 GB/s",
    ("sampling", "bf16, batch 64"): "20 images/s, share 0.60",
    ("sampling", "bf16, batch 64, compiled"): "24 images/s, share 0.71",
    ("sampling", "bf16, batch 10"): "14 images/s, share 0.43",
    ("sampling", "fp32 with TF32, batch 1, as the published scripts"): "1.4 images/s",
    ("sampling", "fp32 with TF32, batch 10, as the published scripts"): "10 images/s",
    ("sampling", "fp32 without TF32, batch 10"): "2 images/s",
    ("sampling", "autoencoder alone"): "500 images/s, share 0.40",
    ("finetune", "N = 2"): "118 samples/s, share 0.18",
    ("finetune", "N = 2, compiled"): "174 samples/s, share 0.26",
    ("finetune", "N = 2, batch 32"): "330 samples/s, share 0.50",
    ("students", "Eq. 10"): "1 s",
    ("training", "cifar10"): "15,000 images/s, share 0.16, the judge names 85 %",
    ("training", "fashion-mnist"): "32,000 images/s, the judge names 92 %",
}
"""(step, case) → prediction for an H100, made before the script had run on any GPU; docs/gpu.md explains the arithmetic."""

NUMBERS = {
    "images_per_s": "images/s", "samples_per_s": "samples/s", "epochs_per_s": "epochs/s", "share": "share",
    "tflop_per_s": "TFLOP/s", "gb_per_s": "GB/s", "seconds": "s", "peak_gb": "GB at most",
    "beside_gb": "GB beside the weights", "cold_s": "s for the first time", "first_step_s": "s for the first step",
    "ms": "ms", "steps": "steps", "epochs": "epochs", "agreement": "% named as asked",
    "judge_accuracy": "% accuracy of the judge", "mb": "MB",
}  # fmt: skip
"""Numeric fields of a row and their units, in the order in which they are shown."""

TITLES = {
    "machine": "The machine", "tests": "Tests of the CUDA paths (`tests/gpu`)",
    "sampling": "Sampling: 256 pixels, DDPM in 50 steps, guidance on 3 of 4 channels",
    "finetune": "Fine-tuning with DiffFit, batches of 8 where nothing else is said", "students": "Students and selection",
    "training": "Generators trained by the clock",
}  # fmt: skip


def tables(values: Mapping[str, Any]) -> str:
    """Results in Markdown: for each step its state, and tables of its rows if it has any."""
    parts = []
    for name, title in TITLES.items():
        if (step := values["steps"].get(name)) is None:
            continue
        where = f" on {step['on']}" if "on" in step else ""
        why = f": {step['error']}" if step.get("error") else ""
        note = f"State: {step['state']}{where}, {step.get('seconds', 0):.0f} s{why}."
        parts += [f"### {title}", "", note, "", *_tables_of(name, step["rows"], step.get("gpu", False))]
    return "\n".join(parts).rstrip() + "\n"


def _tables_of(name: str, rows: Sequence[Mapping[str, Any]], on_gpu: bool) -> list[str]:
    """Predictions are shown beside results from a GPU, but not beside those of a rehearsal on CPUs."""
    if name == "tests":
        return _tests(rows)
    lines = []
    main = [row for row in rows if _label(row) and "error" not in row]
    if main:
        lines += ["| | found | predicted for an H100 |", "|---|---|---|"] if on_gpu else ["| | found |", "|---|---|"]
        for row in main:
            predicted = f" {PREDICTED.get((name, _key(row)), '')} |" if on_gpu else ""
            lines.append(f"| {_label(row)} | {_figures(row)} |{predicted}")
        lines.append("")
    if profile := [row for row in rows if "profile" in row]:
        lines += [f"| what the device was busy with ({profile[0]['of']}) | share | ms | calls |", "|---|---|---|---|"]
        lines += [f"| `{row['profile']}` | {row['share']:.1%} | {row['ms']:g} | {row['calls']} |" for row in profile] + [""]
    for row in rows:
        subject = row.get("case") or row.get("set", "")
        lines += [f"- Left out: {row['left out']}."] if "left out" in row else []
        lines += [f"- Failed: {subject}: {row['error']}"] if "error" in row else []
        lines += [f"- {subject} was trained without compilation: {row['not compiled']}"] if "not compiled" in row else []
        lines += [textwrap.fill(f"- {subject}, {line}", 120, subsequent_indent="  ") for line in row.get("quality", ())]
    return [*lines, ""] if lines and lines[-1] else lines


def _tests(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    collected = sum(row.get("collected", 0) for row in rows)
    rows = [row for row in rows if "test" in row]
    counts = {outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("passed", "failed", "skipped")}
    counts["not reached"] = max(0, collected - len(rows))
    lines = [f"Of {collected} tests: {', '.join(f'{count} {outcome}' for outcome, count in counts.items() if count)}.", ""]
    bad = [f"- `{row['test']}`: {' '.join(row['error'].split())[:300]}" for row in rows if row["outcome"] == "failed"]
    return [*lines, *bad, *([""] if bad else [])]


def _label(row: Mapping[str, Any]) -> str:
    """The title of a row; empty for a point of a curve."""
    if "device" in row:
        return " ".join(str(row[key]) for key in ("device", "driver", "torch") if row.get(key))
    if "matmul" in row:
        return f"matrix products, {row['matmul']}"
    if "copy" in row:
        return f"copy, {row['copy']}"
    return str(row.get("case") or (row["set"] if row.get("result") else ""))


def _key(row: Mapping[str, Any]) -> str:
    """The row's key in :data:`PREDICTED`."""
    return str(row.get("matmul") or ("copy" if "copy" in row else row.get("case") or row.get("set", "")))


def _figures(row: Mapping[str, Any]) -> str:
    if "device" in row:
        return ", ".join(f"{row[key]} {unit}" for key, unit in (("memory_gb", "GB"), ("cpus", "CPU cores")) if key in row)
    return ", ".join(f"{row[key]:,g} {unit}" for key, unit in NUMBERS.items() if key in row)


def write_page(out: Path, page: Path) -> int:
    """Write the tables of ``out`` between the marks of ``page``, and the images next to it; on an error print it, return 2."""
    file = out / "results.json"
    if not file.is_file():
        print(f"error: '{file}' does not exist; --report takes the OUT of an earlier call", file=sys.stderr)
        return 2
    values = json.loads(file.read_text())
    text = page.read_text() if page.is_file() else f"# On a GPU\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        print(f"error: '{page}' has no lines '{BEGIN}' and '{END}' to write between", file=sys.stderr)
        return 2
    pictures = page.parent / "images"
    found = tables(values)
    rows = values["steps"].get("training", {}).get("rows", [])
    for name in dict.fromkeys(row["set"] for row in rows if row.get("result")):
        pictures.mkdir(exist_ok=True)
        shutil.copyfile(out / f"{name}-dit.png", pictures / f"gpu-{name}.png")
        curve(rows, name, pictures / f"gpu-{name}-loss.png")
        found += f"\n![samples of the {name} generator, ordered by class](images/gpu-{name}.png)\n"
        found += f"\n![its training loss](images/gpu-{name}-loss.png)\n"
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n\n{found}\n{END}{rest.split(END)[1]}")
    print(f"{page}: written")
    return 0


def curve(rows: Sequence[Mapping[str, Any]], name: str, picture: Path) -> None:
    """Plot the training loss against the seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [(row["seconds"], row["loss"]) for row in rows if row.get("set") == name and "loss" in row]
    figure, axes = pyplot.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(*zip(*points, strict=True) if points else ((), ()))
    axes.set(xlabel="seconds of training", ylabel="L_Diff", yscale="log", title=name)
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
