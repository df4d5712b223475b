"""The code blocks of docs/extending.md, run as they stand there: a component of each kind from a plugin, on Ray."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ims3_ray.data.sources import open_source
from tests.e2e.conftest import ROOT, environment

LONGEST = 40
"""Lines of an example."""


def blocks() -> dict[str, str]:
    """File → content, of the page's code blocks."""
    page = (ROOT / "docs" / "extending.md").read_text()
    found = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", page, re.DOTALL)
    return dict(found)


def test_every_example_is_short():
    assert len(blocks()) == 8
    for name, content in blocks().items():
        assert content.count("\n") <= LONGEST, name


TWICE = "from ims3_ray.selection import Selector\n\n\nclass F(Selector):\n    name = 'first'\n"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "distill.py"), "--config", "mine.yaml", *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=400)


@pytest.mark.slow
def test_plugins_of_every_kind_take_part_in_a_run(tmp_path: Path):
    for name, content in blocks().items():
        (tmp_path / name).write_text(content)
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "runs" / "mine"
    results = json.loads((folder / "results.json").read_text())
    assert list(results["sets"]) == ["mine", "moved"]
    assert all(list(found["rows"]) == ["hard/mlp"] for found in results["sets"].values())
    assert set(results["brightness"]) == {"mine", "moved"}
    assert all(0 < value < 255 / 200 for value in results["brightness"].values())
    titles = [row["title"] for row in results["stages"]]
    assert any("fine-tune with diffusion + IM + norm" in title for title in titles)
    assert any("euler, 6 steps" in title for title in titles)
    assert "<figcaption>norm</figcaption>" in (folder / "report.html").read_text()
    losses = next((tmp_path / "runs" / "artifacts" / "finetune").glob("*/shards/losses-0.json"))
    assert all(row["loss_norm"] >= 0 for row in json.loads(losses.read_text()))
    exported = open_source(str(folder / "distilled" / "data"), "train")
    assert exported.class_names == ("Bag", "Trouser")
    assert exported.labels.tolist() == [0, 0, 1, 1]

    # The same command has nothing to do; with another source of the objective the fine-tuning is another one.
    assert run(tmp_path, "--dry-run").stdout.count("done") == len(titles)
    source = (tmp_path / "norm.py").read_text()
    (tmp_path / "norm.py").write_text(source.replace("- 1).square()", "- 1).abs()"))
    plan = [line for line in run(tmp_path, "--dry-run").stdout.splitlines() if " done " in line or " units " in line]
    made = {title for title in titles if any(line.startswith(title) and " done " in line for line in plan)}
    assert {title for title in titles if title.startswith("fine-tune")}.isdisjoint(made)
    assert {"encode train images", "select (Moved)", "synthesise (Moved, toward_mean)"} <= made


@pytest.mark.parametrize(
    ("plugin", "source", "says"),
    [
        ("missing.py", None, "plugin 'missing.py' does not exist"),
        ("no_such_module_at_all", None, "plugin 'no_such_module_at_all' cannot be imported (ModuleNotFoundError"),
        ("my-method.py", "x = 1", "'my-method' is no name in Python; rename the file"),
        ("broken.py", "a = 1\nb = 1 / 0\n", "fails when it is loaded, line 2 (ZeroDivisionError: division by zero)"),
        ("twice.py", TWICE, "two of the name 'first'"),
    ],
)  # fmt: skip
def test_a_plugin_that_cannot_be_loaded_is_one_line(plugin: str, source: str | None, says: str, tmp_path: Path):
    if source is not None:
        (tmp_path / plugin).write_text(source)
    (tmp_path / "mine.yaml").write_text(f"plugins: [{plugin}]\n")
    done = run(tmp_path, "--dry-run")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
