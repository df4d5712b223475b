"""Benchmarks as a person runs them. What they find depends on the machine, so only their form is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ims3_ray.models.dit import PUBLISHED, DiT, DiTConfig
from tests.e2e.conftest import ROOT, environment, whole_values, write_config


@pytest.fixture
def without_ray(tmp_path: Path) -> dict[str, str]:
    """An environment in which Ray and MLflow cannot be imported, as on a bare machine with a GPU."""
    for absent in ("ray", "mlflow"):
        (tmp_path / f"{absent}.py").write_text("raise ImportError(__name__)\n")
    return environment(PYTHONPATH=str(tmp_path))


def report(script: str, *arguments: str, env: dict[str, str], timeout: float = 200) -> dict[str, Any]:
    command = [sys.executable, f"benchmarks/{script}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["machine"]["torch"]
    return found


def flop_of(row: dict[str, Any]) -> float:
    """TFLOP that a sample takes by a row's rates."""
    return float(row["tflop_per_s"] / row["samples_per_s"])


def counted_flop(shape: DiTConfig) -> float:
    """Floating-point operations of a forward pass, counted operation by operation."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latents = torch.zeros(1, shape.in_channels, shape.input_size, shape.input_size)
        DiT(shape)(latents, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    return float(counter.get_total_flops())


@pytest.mark.slow
def test_random_kills_over_a_whole_run_change_nothing(tiny_world: Path, tmp_path: Path):
    """The short form of benchmarks/chaos.py."""
    run = whole_values(tiny_world, tmp_path)
    run = {key: value for key, value in run.items() if key not in ("name", "storage")}
    file = write_config(tmp_path / "chaos.yaml", {"run": run})
    found = report("chaos", "--config", file, "kills=4", "every_s=4", env=environment(), timeout=500)
    assert (found["same"], found["missing"], found["unexpected"], found["kills"]) == (True, 0, 0, 4)
    assert sum(found["by_kind"].values()) == 4


@pytest.mark.slow
def test_the_parts_that_grow_with_the_data_are_measured(tmp_path: Path):
    sizes = ["classes=4", "per_class=3", "groups=2", "images=60", "rows=50", "size=32", "features=16", "units=30"]
    found = report("scale", *sizes, f"folder={tmp_path}", env=environment())
    assert set(found["config"]["parts"]) == {"plan", "parquet", "s3", "export", "student", "driver"} <= set(found)
    assert found["plan"]["plan"]["units"] > 4
    assert found["export"]["one file"] | {"images": 12, "files": 1} == found["export"]["one file"]
    assert found["student"]["cached"]["images"] == 4 * (3 + 50 + 50)
    assert found["driver"]["one by one"]["units"] == found["driver"]["ten at a time"]["units"] == 30
    parts = [row for name in found["config"]["parts"] for row in found[name].values() if isinstance(row, dict)]
    assert len(parts) == 12
    assert all(row["seconds"] >= 0 and row["peak_gb"] >= 0 for row in parts)
    assert not list(tmp_path.iterdir()), "the stand-ins are removed"


@pytest.mark.slow
def test_fine_tuning_is_measured_on_a_machine_without_ray(without_ray: dict[str, str], tmp_path: Path):
    (tmp_path / "diffusers.py").write_text("raise ImportError(__name__)\n")
    cases = "cases=[ZeRO 2, L_Diff alone]"
    found = report("finetune", "workers=2", "batch_size=1", "steps=3", cases, env=without_ray)
    assert found["model"].startswith("DiT-")
    assert [row["case"] for row in found["cases"]] == ["ZeRO 2", "L_Diff alone"]
    # Inversion matching with N = 2 takes five passes where L_Diff takes two; PyTorch counts what one takes.
    size, patch = found["model"].removeprefix("DiT-").split("/")
    one = 1e-12 * counted_flop(PUBLISHED[size].model_copy(update={"patch_size": int(patch)}))
    assert [flop_of(row) / one for row in found["cases"]] == pytest.approx([5, 2], rel=0.02)
    for row in found["cases"]:
        assert row["share"] > 0
        assert 0.1 < row["peak_gb"] < 8


@pytest.mark.slow
def test_making_candidates_is_measured_on_a_machine_without_ray(without_ray: dict[str, str]):
    small = ("model=S", "patch=8", "image_size=64", "batch=2", "units=1", "steps=2")
    found = report("pool", *small, "cases=[baseline, 'unit, fp32']", env=without_ray)
    assert [row["case"] for row in found["cases"]] == ["baseline", "unit, fp32"]
    for row in found["cases"]:
        assert row["share"] == pytest.approx(row["tflop_per_s"] / row["matmul_tflop_per_s"], rel=0.1)  # both are rounded
        # Nearly all of it is the autoencoder: 622 GFLOP at 256 pixels, a sixteenth of that at 64.
        assert 0.01 < row["tflop_per_image"] < 0.1
        assert 0.1 < row["peak_gb"] < 8


def test_selection_is_measured_on_a_machine_without_ray(without_ray: dict[str, str]):
    found = report("selection", "classes=[4, 8]", "groups=[3]", "features=16", env=without_ray)
    assert [(row["C"], row["coupling"]) for row in found["cases"]] == [
        (4, "pool"), (4, "selected"), (8, "pool"), (8, "selected"),
    ]  # fmt: skip
    for row in found["cases"]:
        assert 0 < row["seconds"] < 60
        assert (row["gap"] == 0) or row["coupling"] == "selected"
        assert row["objective"] < 0, "subgroups lie nearer to their references than to other classes"


def test_evaluation_is_measured_on_a_machine_without_ray(without_ray: dict[str, str]):
    small = ("seconds=0.1", "images_per_class=1", "width=4", "workers=1")
    found = report("evaluation", *small, "cases=[DataLoader, device]", env=without_ray)
    assert [row["case"] for row in found["cases"]] == ["DataLoader", "device"]
    for row in found["cases"]:
        assert 0 < row["share"] < 1


def test_a_case_that_does_not_exist_is_named():
    done = subprocess.run(
        [sys.executable, "benchmarks/finetune.py", "cases=[ZeRO 4]"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no case 'ZeRO 4'; choose from: ZeRO 0;")


def test_the_gradients_of_inversion_matching_are_measured_on_a_machine_without_ray(
    without_ray: dict[str, str], tiny_world: Path, tmp_path: Path
):  # fmt: skip
    world = [f"generator={tiny_world}/dit.safetensors", f"data.path={tiny_world}/data", "data.size=8"]
    found = report(
        "inversion",
        *world,
        "bands=2",
        "batches=3",
        "batch_size=4",
        "n_steps=[1,2]",
        f"figure={tmp_path}/it.svg",
        env=without_ray,
    )
    rows = found["rows"]
    assert [row["timesteps"] for row in rows] == [[0, 499]] * 4 + [[500, 999]] * 4
    assert [(row.get("n_steps"), row.get("grad_steps")) for row in rows[:4]] == [(None, None), (1, 1), (2, 1), (2, 2)]
    for row in rows:
        if "diffusion" in row:
            floor, diffusion = row["floor"], row["diffusion"]
            assert 0 < floor < 1
        else:
            assert row["loss"] >= floor - 0.15  # few draws of the noise
            assert -1 <= row["alike"] <= 1
            assert row["balance"] == pytest.approx(diffusion["length"] / row["length"], rel=0.02)
    assert "floor" in (tmp_path / "it.svg").read_text()


@pytest.mark.parametrize(("candidates", "features"), [("real", "pixels"), ("generated", "encoder"), ("real", "untrained")])
def test_the_choice_of_s3_is_measured_on_a_machine_without_ray(
    without_ray: dict[str, str], tiny_world: Path, tmp_path: Path, candidates: str, features: str
):  # fmt: skip
    found = report(
        "subgroups", f"candidates={candidates}", f"features={features}", f"generator={tiny_world}/dit.safetensors",
        f"encoder={tiny_world}/phi.safetensors", f"data.path={tiny_world}/data", "data.size=8", "k=[2]", "ranked=4",
        "groups=[1,4]", "draws=2", "students=1", "held_out=5", "sampling={steps: 2, unit_size: 4}",
        "protocol={width: 4, epochs: 2, validations: 1}", f"figure={tmp_path}/found.svg", env=without_ray,
    )  # fmt: skip
    (size,) = found["sizes"]
    assert size["score_by_rank"] == sorted(size["score_by_rank"])
    assert len(size["accuracy_by_rank"]) == 4
    one, four = size["groups"]
    assert set(one) == {"groups", "best", "best_sem"}, "there is one subgroup to choose"
    assert set(four) == {"groups", "best", "best_sem", "worst", "worst_sem"}
    assert (tmp_path / "found.svg").read_text().count("<use") > 4


@pytest.mark.slow
def test_what_inversion_matching_does_to_samples_is_measured_on_a_machine_without_ray(
    without_ray: dict[str, str], tiny_world: Path, tmp_path: Path
):  # fmt: skip
    small = (
        f"generator={tiny_world}/dit.safetensors", f"encoder={tiny_world}/phi.safetensors", f"data.path={tiny_world}/data",
        "data.size=8", "lambdas=[0,0.5]", "steps=[1,3]", "finetune={batch_size: 4, precision: fp32, lr: 0.01}",
        "sampling={steps: 2, cfg_scale: 1.5}", "guidances=[1]", "samples=3", "held_out=3", "k=2", "processes=1",
        "instability={images: 2, steps: 2, probes: 1}", "protocol={width: 4, epochs: 1, validations: 1}",
    )  # fmt: skip
    found = report("matching", *small, f"out={tmp_path}/kept", env=without_ray)["results"]
    runs = [f"{name} {steps}" for steps in (1, 3) for name in ("0", "0.5", "0 again")]
    assert list(found) == ["real images", "pretrained", "pretrained, guidance 1", *runs]
    assert len({found[run]["matching"] for run in runs}) == len(runs), (
        "weights, numbers of steps and batches change the network"
    )
    assert [run for run in found if "instability" in found[run]] == ["pretrained", "0 3", "0.5 3", "0 again 3"]
    again = report("matching", *small, f"out={tmp_path}/kept", "students=1", f"figure={tmp_path}/it.svg", env=without_ray)
    assert all(len(row.pop("accuracy")) == 1 for row in again["results"].values())
    assert again["results"] == found, "what was there has not been measured again"
    assert "coverage of samples" in (tmp_path / "it.svg").read_text()
