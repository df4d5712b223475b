"""The notebook of the pages runs from its first cell to its last, with less work."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.e2e.conftest import ROOT

LESS = ["finetune.steps=2", "finetune.batch_size=4", "sampling.steps=2", "selection.groups=1", "synthesis.dm.steps=2",
        "evaluation.seeds=[0]", "evaluation.protocols.hard={epochs: 1, width: 4}", "data.limit=60", "stages={}",
        "quality={stop_below: 0, warn_below: 0}"]  # fmt: skip


@pytest.mark.slow
def test_the_notebook_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    notebook = nbformat.read(ROOT / "docs" / "notebooks" / "first-steps.ipynb", as_version=4)
    nbformat.validate(notebook)
    settings = next(cell for cell in notebook.cells if "OVERRIDES: list[str] = []" in cell.source)
    settings.source = settings.source.replace("OVERRIDES: list[str] = []", f"OVERRIDES: list[str] = {LESS}")
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = ["".join(output.get("text", "") for output in cell.get("outputs", ())) for cell in notebook.cells]
    assert any("IMS3 + DM" in text and "±" in text for text in said)
    assert any("convnet-2 on the distilled set:" in text for text in said)
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == 1
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
