"""``benchmarks/gpu.py`` as it runs on a bare machine, rehearsed on CPUs with small models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ims3_ray.config import PretrainConfig
from ims3_ray.config.loading import load_config
from ims3_ray.models.checkpoints import read_metadata
from tests.e2e.conftest import ROOT, environment

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu
import gpu_report


def bare(folder: Path) -> dict[str, str]:
    """An environment without what a machine that has PyTorch alone lacks."""
    for absent in ("ray", "mlflow", "deepspeed", "diffusers", "matplotlib"):
        (folder / f"{absent}.py").write_text("raise ModuleNotFoundError(__name__, name=__name__)\n")
    return environment(PYTHONPATH=str(folder), OMP_NUM_THREADS="1")  # a busy machine stalls threads that wait for each other


def command(out: Path, *arguments: str) -> list[str]:
    return [sys.executable, "benchmarks/gpu.py", str(out), *arguments]


def steps_of(out: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((out / "results.json").read_text())["steps"]
    except FileNotFoundError:
        return {}
    return found


@pytest.mark.slow
def test_a_step_that_is_killed_loses_itself_alone(tmp_path: Path):
    env, out = bare(tmp_path), tmp_path / "out"
    first = command(out, "--only=machine,students", "--minutes=8")  # far more than they take, whatever else runs here
    with subprocess.Popen(first, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as running:
        while not steps_of(out).get("machine", {}).get("rows"):
            assert running.poll() is None, "it ended before the step had found anything"
            time.sleep(0.02)
        os.killpg(steps_of(out)["machine"]["pid"], signal.SIGKILL)
        printed, _ = running.communicate(timeout=500)
    found = steps_of(out)
    assert running.returncode == 1, printed
    assert [found[name]["state"] for name in ("machine", "students")] == ["failed", "done"], printed
    assert found["machine"]["rows"], "what it had found before is kept"
    assert found["machine"]["error"] == "killed by signal 9"
    again = subprocess.run(command(out, "--only=machine", "--minutes=8"), cwd=ROOT, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    repeated = steps_of(out)
    assert {"fp32"} == {row["matmul"] for row in repeated["machine"]["rows"] if "matmul" in row}
    assert repeated["students"] == found["students"]


@pytest.mark.slow
def test_training_that_was_stopped_by_its_limit_goes_on_from_what_it_left(tmp_path: Path):
    env, out = bare(tmp_path), tmp_path / "out"
    first = subprocess.run(
        command(out, "--only=training", "--minutes=1"), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    found = steps_of(out)
    assert (first.returncode, found["training"]["state"]) == (0, "done"), first.stdout + first.stderr
    result = found["training"]["rows"][-1]
    assert result["set"] == "fashion-mnist"
    assert 0 <= result["agreement"] <= 100
    assert "Generators trained by the clock" in first.stdout
    files = list(out.iterdir())
    assert len(files) <= 8
    assert all(file.stat().st_size < 16e6 for file in files)
    weights = out / "fashion-mnist-dit.safetensors"
    assert read_metadata(weights, "dit")["classes"].startswith("T-shirt/top\n")
    again = subprocess.run(
        command(out, "--only=training", "--minutes=0.6"), cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert again.returncode == 0, again.stderr
    rows = steps_of(out)["training"]["rows"]
    assert rows[: len(found["training"]["rows"])] == found["training"]["rows"]
    assert rows[-1]["steps"] > result["steps"]
    assert rows[-1]["seconds"] > result["seconds"]
    page = tmp_path / "page" / "gpu.md"
    page.parent.mkdir()
    assert gpu_report.write_page(out, page) == 0
    text = page.read_text()
    assert "fashion-mnist" in text
    assert {picture.name for picture in (page.parent / "images").iterdir()} == {
        "gpu-fashion-mnist.png", "gpu-fashion-mnist-loss.png",
    }  # fmt: skip
    assert gpu_report.write_page(out, page) == 0
    assert page.read_text() == text, "written twice it is the same"


@pytest.mark.slow
def test_the_other_steps_measure_too(tmp_path: Path):
    out, names = tmp_path / "out", ["tests", "sampling", "finetune"]
    done = subprocess.run(
        command(out, f"--only={','.join(names)}", "--minutes=4"), cwd=ROOT, env=bare(tmp_path), capture_output=True, text=True,
        timeout=280,
    )  # fmt: skip
    found = steps_of(out)
    assert (done.returncode, [found[name]["state"] for name in names]) == (0, ["done"] * 3), done.stdout + done.stderr
    results = {row["test"]: row["outcome"] for row in found["tests"]["rows"] if "test" in row}
    assert len(results) == found["tests"]["rows"][0]["collected"] > 20
    assert set(results.values()) == {"passed", "skipped"}, "those of the autoencoder need diffusers, which is not there"
    cases = {row["case"]: row for row in found["sampling"]["rows"] if "case" in row}
    assert {"fp32, batch 1", "fp32, batch 2", "fp32, batch 4"} <= cases.keys()
    for row in cases.values():
        assert row["images_per_s"] > 0
        assert row["share"] > 0
    assert any("diffusers is missing" in row.get("left out", "") for row in found["sampling"]["rows"])
    tuned = {row["case"]: row["tflop_per_s"] / row["samples_per_s"] for row in found["finetune"]["rows"] if "case" in row}
    # Passes of a sample: two for L_Diff, one for each inversion step, one more for that which carries the gradient.
    for name, passes in {"L_Diff alone": 2, "N = 1": 4, "N = 5": 8, "N = 2, batch 32": 5, "N = 2, compiled": 5}.items():
        assert tuned[name] / tuned["N = 2"] == pytest.approx(passes / 5, rel=0.15), name
    assert any("deepspeed is missing" in row.get("left out", "") for row in found["finetune"]["rows"])


def test_a_step_without_its_packages_is_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "pydantic" else name)
    assert gpu.measure(tmp_path, None, 60, ["sampling"], again=False) == 0
    found = steps_of(tmp_path)["sampling"]
    assert found["state"] == "not run"
    assert found["error"].startswith("needs pydantic")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT", "--only=machine,fast"], "there is no step 'fast'"),
        ([], "give OUT"),
        (["OUT", "--minutes=0"], "above 0"),
        (["OUT", "--data=nowhere"], "is no folder"),
        (["OUT", "--data=."], "has no cifar10-train.parquet"),
    ],
)
def test_a_wrong_call_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        gpu.main(arguments)
    assert left.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_what_has_to_be_copied_is_named_with_its_size(tmp_path: Path):
    (tmp_path / "cifar10-train.parquet").write_bytes(bytes(2_500_000))
    text = gpu.needs(tmp_path)
    assert "2.5 MB" in text
    assert "pydantic is here" in text
    assert float(next(line for line in text.splitlines() if "together" in line).split()[0]) < 60


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_recipes_fit_into_a_file_of_16_megabytes(name: str):
    import torch

    from ims3_ray.models.dit import DiT
    from ims3_ray.training.generator import dit_config

    config = load_config(PretrainConfig, ROOT / "configs" / "pretrain" / f"{name}-dit-minutes.yaml")
    with torch.device("meta"):
        model = DiT(dit_config(config.generator, config.data.size, config.data.channels, 10))
    assert 2 * sum(p.numel() for p in model.parameters()) + 10_000 < 16e6


def test_a_page_without_marks_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "results.json").write_text('{"steps": {}}')
    page = tmp_path / "page.md"
    page.write_text("mine\n")
    assert gpu_report.write_page(tmp_path, page) == 2
    assert "has no lines" in capsys.readouterr().err
    assert page.read_text() == "mine\n"
    assert gpu_report.write_page(tmp_path / "none", page) == 2


def test_tables_show_what_was_found_beside_what_was_predicted():
    rows: list[dict[str, Any]] = [
        {"case": "bf16, batch 64", "images_per_s": 18.5, "share": 0.55},
        {"profile": "gemm", "of": "batch 64", "share": 0.5, "ms": 3.0, "calls": 7},
        {"left out": "decoding"},
        {"case": "broken", "error": "RuntimeError: no"},
    ]
    steps: dict[str, Any] = {"sampling": {"state": "done", "rows": rows, "seconds": 3.2}}
    assert "| bf16, batch 64 | 18.5 images/s, 0.55 share |\n" in gpu_report.tables({"steps": steps}), "a rehearsal"
    text = gpu_report.tables({"steps": {"sampling": {**steps["sampling"], "on": "NVIDIA H100", "gpu": True}}})
    assert "State: done on NVIDIA H100, 3 s." in text
    expected = gpu_report.PREDICTED["sampling", "bf16, batch 64"]
    assert f"| bf16, batch 64 | 18.5 images/s, 0.55 share | {expected} |" in text
    assert "| `gemm` | 50.0% | 3 | 7 |" in text
    assert "- Left out: decoding." in text
    assert "- Failed: broken: RuntimeError: no" in text
