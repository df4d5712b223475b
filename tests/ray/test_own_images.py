"""A person's own images, with real Ray: without a generator, with one that is no good, and the best set exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ims3_ray import distill
from ims3_ray.config import RunConfig
from ims3_ray.config.loading import load_config
from ims3_ray.data.sources import open_source
from ims3_ray.errors import UserError
from ims3_ray.plan import make_plan
from ims3_ray.report.results import RunResult
from ims3_ray.stages import export
from tests.conftest import tiny_values
from tests.ray.conftest import Run

CONFIGS = Path(__file__).parents[2] / "configs"


def of_the_tiny_run(world: Path, run: Run, **changes: Any) -> RunConfig:
    """A config whose stages the tiny run has made, but for what ``changes`` say."""
    return RunConfig.model_validate({**tiny_values(world, run.folder.parent), "export": "ims3", **changes})


def test_a_pool_that_is_not_recognised_ends_the_run_until_the_limit_is_lowered(tiny_world: Path, tiny_run: Run):
    strict = of_the_tiny_run(tiny_world, tiny_run, name="gate", quality={"stop_below": 0.99})
    for _ in range(2):  # the same command says it again
        with pytest.raises(UserError, match=r"generate \(.*\): φ recognises .* of real images .* quality.stop_below=0.99 ends"):
            distill(strict)
    assert not (tiny_run.folder.parent / "gate" / "results.json").exists()
    found = distill(of_the_tiny_run(tiny_world, tiny_run, name="gate", quality={"stop_below": 0, "warn_below": 0}))
    pools = found.results["recognised"]
    assert set(pools) == {"generate (pretrained)", "generate (fine-tuned)"}
    assert all(0 <= share <= 1 for pool in pools.values() for shares in pool.values() for share in shares.values())


@pytest.mark.slow
def test_images_that_are_not_kept_are_decoded_again_by_all_who_need_them(tiny_world: Path, tiny_run: Run, tmp_path: Path):
    """Fine-tuning, selection among real images and among samples, and students: all is as if the images had been stored."""
    values = tiny_values(tiny_world, tmp_path, export="ims3")
    values["data"] = {**values["data"], "keep": False}
    found = distill(RunConfig.model_validate(values))
    assert not list(tmp_path.glob("artifacts/encode/*/shards/*.safetensors"))
    for name, value in (("content", str), ("rows", dict)):
        sets, before = (
            {arm: row[name] for arm, row in each["sets"].items()} for each in (found.results, tiny_run.result.results)
        )
        assert sets == before
        assert all(isinstance(each, value) for each in sets.values())


def exported(found: RunResult) -> list[tuple[str, bytes, int]]:
    """Path, PNG and label of each exported image, in order."""
    files = sorted((Path(found.folder) / "distilled" / "data").iterdir())
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return [(row["image"]["path"], row["image"]["bytes"], row["label"]) for row in rows]


def test_a_large_set_is_exported_as_several_files(tiny_world: Path, tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(export, "FILE_BYTES", 100)
    found = distill(of_the_tiny_run(tiny_world, tiny_run, name="files"))
    folder = Path(found.folder) / "distilled"
    assert sorted(file.name for file in (folder / "data").iterdir()) == [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    whole = RunResult(str(tiny_run.folder), {})
    assert exported(found) == exported(whole)
    assert {file.name for file in (folder / "images").rglob("*.png")} == {Path(path).name for path, _, _ in exported(whole)}
    assert open_source(str(folder), "train").class_names == open_source(str(tiny_run.folder / "distilled"), "train").class_names


def test_images_that_the_pool_has_as_png_are_exported_as_they_are(
    tiny_world: Path, tiny_run: Run, monkeypatch: pytest.MonkeyPatch
):
    before = exported(RunResult(str(tiny_run.folder), {}))
    monkeypatch.setattr(export, "encode_png", None)
    monkeypatch.setattr(export.Export, "version", 1000)
    assert exported(distill(of_the_tiny_run(tiny_world, tiny_run, name="again"))) == before
    with pytest.raises(TypeError, match="not callable"):
        distill(of_the_tiny_run(tiny_world, tiny_run, name="decoded", export="random_real"))


def test_the_set_that_is_best_on_held_out_images_is_exported(tiny_world: Path, tiny_run: Run):
    found = distill(of_the_tiny_run(tiny_world, tiny_run, name="best", export="best"))
    chosen = found.results["exported"]
    assert set(chosen["held_out"]) == set(found.results["sets"])
    assert chosen["held_out"][chosen["arm"]] == max(chosen["held_out"].values())
    arm = of_the_tiny_run(tiny_world, tiny_run, name=f"only-{chosen['arm']}", export=chosen["arm"])
    named = distill(arm)
    files = [Path(each.folder) / "distilled" for each in (found, named)]
    contents = [{f.name: f.read_bytes() for f in folder.rglob("*.png")} for folder in files]
    assert contents[0] == contents[1]
    assert contents[0]


def test_own_images_need_no_generator_and_no_encoder(tmp_path: Path, cluster: None):
    names = ("Ankle boot", "Käse", "sneaker")
    for split, count in (("train", 16), ("test", 4)):
        rng = np.random.default_rng(count)
        for label, name in enumerate(names):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (10, 12, 4), dtype=np.uint8)
                pixels[..., label] += 170
                pixels[..., 3] = 255
                pixels[:2, :, 3] = 0
                Image.fromarray(pixels).save(folder / f"{number}.png")
    config = load_config(
        RunConfig,
        CONFIGS / "own-images.yaml",
        [
            f"data.path={tmp_path / 'photos'}", f"storage={tmp_path / 'runs'}", "data.size=16", "generator=nowhere.safetensors",
            "selection.images_per_class=2", "synthesis.dm={steps: 2, width: 8, batch_size: 4}", "evaluation.seeds=[0]",
            "evaluation.protocols.hard={width: 8, epochs: 4, validations: 1}", "evaluation.val_per_class=4",
            "evaluation.teacher.training={epochs: 2, model_args: {layers: [1, 1, 1, 1], channels: [8, 8, 8, 8]}}",
        ],
    )  # fmt: skip
    found = distill(config)
    assert set(found.results["sets"]) == {"random_real", "herding", "dm"}
    assert {stage.name for stage in make_plan(config).stages} & {"generate", "finetune", "adopt"} == set()
    distilled = Path(found.folder) / "distilled"
    assert {folder.name for folder in (distilled / "images").iterdir()} == set(names)
    assert open_source(str(next(distilled.rglob("*.parquet"))), "train").class_names == names
