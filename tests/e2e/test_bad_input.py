"""Bad input: one line that names the fix, exit code 2, nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ims3_ray.cli import ims3
from ims3_ray.config import RunConfig
from tests.conftest import CLASSES, tiny_values
from tests.e2e.conftest import run_job, write_config

Job = Callable[..., tuple[int, str]]


@pytest.fixture
def job(tiny_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Job:
    """The distill job in this process, on the tiny world: (exit code, standard error)."""
    config = write_config(tmp_path / "config.yaml", tiny_values(tiny_world, tmp_path / "runs"))

    def call(*arguments: str) -> tuple[int, str]:
        return ims3(["distill", "--config", config, *arguments]), capfd.readouterr().err

    return call


def refused(job: Job, tmp_path: Path, *arguments: str) -> str:
    """The one line that ``job`` refuses its input with."""
    code, err = job(*arguments)
    assert code == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("error: ")
    assert not (tmp_path / "runs").exists()
    return line


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("selection.alhpa=0.4", ["selection.alhpa", "did you mean 'selection.alpha'"]),
        ("selektion.alpha=0.4", ["selektion", "did you mean 'selection"]),
        ("pool.per_class=5", ["per_class=5", "fewer than 6 images", "selection.groups=3", "raise it"]),
        ("selection={alpha: 0, beta: 0}", ["alpha and beta are both 0", "raise one"]),
        ("selection.groups=0", ["selection.groups=0", "greater than or equal to 1"]),
        ("finetune={batch_size: 1, trainer: {num_workers: 2}}", ["batch_size=1", "2 workers"]),
        ("arms=[1", ["arms=[1"]),
        ("selection.alpha", ["key=value"]),
        ("data.path=/no/such/folder", ["'/no/such/folder' does not exist", "give a folder"]),
        ("selection.images_per_class=31", ["class 'left' has 30 images", "images_per_class=31", "lower it"]),
        ("data.classes=[left, rihgt]", ["rihgt", "did you mean 'right'"]),
        ("data.size=16", ["makes 1×8×8 images", "data.size=8"]),
        ("generator=/no/dit.safetensors", ["'/no/dit.safetensors' do not exist"]),
        ("storage=s9://bucket/x", ["s9://bucket/x", "cannot be reached"]),
    ],
)
def test_what_the_config_says_is_impossible(job: Job, tmp_path: Path, override: str, says: list[str]):
    line = refused(job, tmp_path, override)
    for part in says:
        assert part in line


def test_a_config_file_that_is_not_there_or_no_yaml(job: Job, tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("selection: [1,")
    assert "bad.yaml" in refused(job, tmp_path, "--config", str(tmp_path / "bad.yaml"))
    assert "missing.yaml" in refused(job, tmp_path, "--config", str(tmp_path / "missing.yaml"))


def test_sources_that_are_empty_or_unreadable(job: Job, tiny_world: Path, tmp_path: Path):
    empty = tmp_path / "empty"
    for split in ("train", "test"):
        for name in CLASSES:
            (empty / split / name).mkdir(parents=True)
    assert "holds no image" in refused(job, tmp_path, f"data.path={empty}")
    cut = tmp_path / "cut"
    shutil.copytree(tiny_world / "data", cut)
    file = cut / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read" in refused(job, tmp_path, f"data.path={cut}")
    no_parquet = tmp_path / "train.parquet"
    no_parquet.write_bytes(b"not parquet")
    assert "cannot be read" in refused(job, tmp_path, f"data.path={no_parquet}")


def test_a_class_that_the_generator_does_not_know(job: Job, tmp_path: Path):
    data = tmp_path / "photos"
    for split in ("train", "test"):
        for name in ("left", "rigth"):
            (data / split / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(np.full((8, 8), len(split), np.uint8)).save(data / split / name / f"{i}.png")
    line = refused(job, tmp_path, f"data.path={data}")
    assert "rigth" in line
    assert "right" in line


def test_weights_that_do_not_fit(job: Job, tiny_world: Path, tmp_path: Path):
    assert "hold a 'encoder' where a 'dit' is needed" in refused(job, tmp_path, f"generator={tiny_world / 'phi.safetensors'}")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((tiny_world / "dit.safetensors").read_bytes()[:5000])
    assert "not a readable safetensors file" in refused(job, tmp_path, f"generator={torn}")


def test_weights_whose_tensors_contradict_their_shape(job: Job, tiny_world: Path, tmp_path: Path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    original = tiny_world / "dit.safetensors"
    with safe_open(original, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(original)
    tensors["final_layer.linear.bias"] = tensors["final_layer.linear.bias"][:-1]
    save_file(tensors, tmp_path / "odd.safetensors", metadata)
    line = refused(job, tmp_path, f"generator={tmp_path / 'odd.safetensors'}")
    assert "'final_layer.linear.bias' is (15,), needed (16,)" in line


def test_a_run_folder_that_holds_another_config(job: Job, tiny_world: Path, tmp_path: Path):
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    config = RunConfig.model_validate(tiny_values(tiny_world, tmp_path / "runs"))
    from ims3_ray.config import canonical

    write_config(folder / "config.yaml", canonical(config))
    code, err = job("selection.alpha=0.7")
    assert code == 2
    assert err.count("\n") == 1
    assert "holds another config (selection.alpha: 0.4 there, 0.7 here)" in err
    assert "name=tiny-2" in err
    assert [p.name for p in folder.iterdir()] == ["config.yaml"]


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    job: Job, tmp_path: Path, capfd: pytest.CaptureFixture[str], tiny_world: Path
):
    config = write_config(tmp_path / "again.yaml", tiny_values(tiny_world, tmp_path / "runs"))
    done = run_job("--config", config, "--dry-run", "finetune.trainer.num_workers=2")
    assert done.returncode == 0
    for text in (
        "encode train images", "fine-tune", "generate (fine-tuned)", "0/6 units", "FLOP, ", "core-hours at",
        "cost: not known", "kB of ", "needs at a time: 2 CPU",
    ):  # fmt: skip
        assert text in done.stdout
    assert not (tmp_path / "runs").exists()


def test_a_cluster_too_small_is_said_at_once(tiny_world: Path, tmp_path: Path):
    config = write_config(tmp_path / "config.yaml", tiny_values(tiny_world, tmp_path / "runs", actors={"count": 999}))
    done = run_job("--config", config)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "too small for the plan: it needs 999 CPU" in line
    assert "actors" in line
    assert not (tmp_path / "runs").exists()


def test_help_teaches():
    done = run_job("--help")
    assert done.returncode == 0
    for text in ("selection.alpha=0.4", "--dry-run", "ray job submit", "data.path=photos", "Exit codes"):
        assert text in done.stdout
