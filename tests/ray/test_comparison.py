"""The comparison of all methods, from the pools and the fine-tuning of the tiny run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load

from ims3_ray import CompareConfig, RunResult, compare
from ims3_ray.config.loading import load_config
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.prediction import guided
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.diffusion.steering.inverted_gaussian import Gaussian, invert_to_start
from ims3_ray.diffusion.steering.modes import find_modes
from ims3_ray.engine.sets import read_set
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.models.generator import load_generator
from ims3_ray.plan import Plan, make_comparison
from ims3_ray.seeds import seed_for
from tests.conftest import tiny_values
from tests.e2e.conftest import ROOT, write_config
from tests.pages import needs_browser, violations
from tests.ray.conftest import Run

pytestmark = pytest.mark.slow

PIXEL_METHODS = {
    "dm": {"steps": 2, "width": 4, "batch_size": 8}, "sre2l": {"steps": 2, "max_roll": 2}, "rded": {"images_per_class": 20},
    "idc": {"outer": 1, "inner": 1, "width": 4, "batch_size": 8, "training_images": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def comparison(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[CompareConfig, RunResult]:
    """Every method at one and two images a class, from the pools and the fine-tuning that the tiny run has made."""
    folder = tmp_path_factory.mktemp("comparison")
    values = tiny_values(Path(tiny_run.config.generator).parent, Path(tiny_run.config.storage), actors={"count": 2})
    values |= {
        "extends": [str(ROOT / f"configs/methods/{name}.yaml") for name in ("all", "cao2-least")], "name": "comparison",
        "finetune": {**values["finetune"], "trainer": {"num_workers": 1}},  # what is trained does not depend on it
        "budgets": [1, 2], "against": "dit", "instability": {"images": 0},
        "arms": {
            "d3hr": {"overrides": {"sampling": {"inverted_gaussian": {"groups": 50, "images_per_class": 10}}}},
            "cao2": {"overrides": {"synthesis": {"cao2": {"steps": 3}}}},
            "cao2_least": {"overrides": {"synthesis": {"cao2": {"steps": 3}}}},
        },
        "synthesis": PIXEL_METHODS,
        "published": {"ims3": {"hard/convnet-3": {2: "99.9 ± 0.1"}}},
    }  # fmt: skip
    values["evaluation"] = {**values["evaluation"], "teacher": {"weights": values["encoder"]}}
    config = load_config(CompareConfig, write_config(folder / "compare.yaml", values))
    return config, compare(config)


@pytest.fixture(scope="module")
def plan(comparison: tuple[CompareConfig, RunResult]) -> Plan[CompareConfig]:
    return make_comparison(comparison[0])


def one(plan: Plan[CompareConfig], kind: str, contains: str = "") -> Stage:
    (found,) = [stage for stage in plan.stages if stage.name == kind and contains in stage.title]
    return found


def test_every_method_has_its_line_and_its_difference(comparison: tuple[CompareConfig, RunResult]):
    config, result = comparison
    tables = result.results["tables"]
    assert [(table["images_per_class"], table["row"]) for table in tables] == [(1, "hard/convnet-3"), (2, "hard/convnet-3")]
    for table in tables:
        assert [line["arm"] for line in table["lines"]] == list(config.arms)
        base = next(line for line in table["lines"] if line["arm"] == "dit")
        assert base["difference"] is None
        for line in table["lines"]:
            if line is not base:
                assert line["difference"]["mean"] == pytest.approx(line["last"]["mean"] - base["last"]["mean"])
    folder = Path(result.folder)
    logged = MlflowClient(f"sqlite:///{folder}/mlflow.db").get_run(result.results["mlflow"]["run"]).data.metrics
    assert (
        "fine_tune_with_diffusion_and_minimax/loss_diversity" in logged
    )  # fine-tunings side by side, each with its own series
    text = (folder / "table.md").read_text()
    assert "99.9 ± 0.1" in text
    assert "99.9 ± 0.1" in (folder / "report.html").read_text()
    for found in result.results["sets"].values():
        assert found["content"] in text
    assert json.loads((folder / "results.json").read_text())["tables"] == tables


@needs_browser
def test_the_report_breaks_no_rule_of_accessibility(comparison: tuple[CompareConfig, RunResult], tmp_path: Path):
    assert violations(Path(comparison[1].report), tmp_path) == []


def test_methods_share_what_they_have_in_common(plan: Plan[CompareConfig], tiny_run: Run):
    assert len([stage for stage in plan.stages if stage.name == "finetune"]) == 4  # L_Diff, IM, Minimax, as released
    assert one(plan, "generate", "(pretrained)").units == tuple(
        sorted(next(s for s in tiny_run.plan.stages if (s.name, s.label) == ("generate", "pretrained")).units)
    )
    sets = {name: scored.images for name, scored in plan.sets.items()}
    for k in (1, 2):
        assert sets[f"ims3 K={k}"].inputs["images"] is sets[f"ims3_selected K={k}"].inputs["images"]
        assert sets[f"dit K={k}"].inputs["images"] is sets[f"dit_s3 K={k}"].inputs["images"]
    finetune = one(plan, "finetune", "diffusion + minimax").run_config.finetune.objectives
    assert (finetune.inversion_matching.weight, finetune.minimax.diversity) == (0, 0.008)


def test_modes_are_those_of_the_real_images_of_each_class(plan: Plan[CompareConfig], tiny_run: Run):
    storage = tiny_run.storage
    modes = one(plan, "modes", "2 modes")
    for position, unit in enumerate(modes.units):
        shards = [u for u in modes.inputs["images"].units if u.startswith(f"c{position:04d}")]
        pixels = torch.cat([load(modes.inputs["images"].artifact(storage).read(f"{u}.safetensors"))["pixels"] for u in shards])
        expected = find_modes(to_signed(pixels), 2, seed_for(0, "modes", position)).centres
        assert torch.equal(load(modes.artifact(storage).read(f"{unit}.safetensors"))["modes"], expected)


def test_inverted_images_are_summed_up_unit_by_unit(plan: Plan[CompareConfig], tiny_run: Run):
    storage, inverted = tiny_run.storage, one(plan, "inverted")
    assert inverted.units == ("c0000-u00000", "c0001-u00000", "c0002-u00000")  # ten of thirty images are a unit of twelve
    model = load_generator(Path(tiny_run.config.generator))
    pixels = load(inverted.inputs["images"].artifact(storage).read("c0001-u00000.safetensors"))["pixels"]
    predict = guided(model, torch.ones(len(pixels), dtype=torch.long), 3, 2.0)
    with torch.no_grad():
        z = invert_to_start(predict, to_signed(pixels), NoiseSchedule(), 3, 0.6).double()
    found = load(inverted.artifact(storage).read("c0001-u00000.safetensors"))
    gaussian = Gaussian.of(found["total"], found["squares"], int(found["count"]))
    torch.testing.assert_close(gaussian.mean, z.mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gaussian.std, z.std(dim=0, correction=0), rtol=1e-3, atol=1e-3)


def test_images_from_prototypes_weigh_as_much_as_their_clusters(plan: Plan[CompareConfig], tiny_run: Run):
    storage = tiny_run.storage
    plain, weighed = (read_set(plan.sets[f"{name} K=2"].images.artifact(storage)) for name in ("d4m_dit", "ddoq_dit"))
    assert torch.equal(plain.pixels, weighed.pixels)
    assert plain.weights is None
    modes = one(plan, "modes", "2 modes")
    for position, unit in enumerate(modes.units):
        counts = load(modes.artifact(storage).read(f"{unit}.safetensors"))["counts"].float()
        torch.testing.assert_close(weighed.weights[2 * position : 2 * position + 2], counts / counts.mean())


def test_guided_started_and_refined_images_differ_from_plain_ones(plan: Plan[CompareConfig], tiny_run: Run):
    pixels = {name: read_set(scored.images.artifact(tiny_run.storage))[0] for name, scored in plan.sets.items()}
    for name in ("mgd3 K=2", "d3hr K=2", "d4m_dit K=2", "cao2 K=2"):
        assert pixels[name].shape == pixels["dit K=2"].shape == (6, 1, 8, 8)
        assert not torch.equal(pixels[name], pixels["dit K=2"])
    refined = plan.sets["cao2 K=2"].images
    chosen = read_set(refined.inputs["set"].artifact(tiny_run.storage))[0]
    moved = (pixels["cao2 K=2"].int() - chosen.int()).abs()
    assert refined.name == "synthesise"
    assert 0 <= moved.max() <= 3  # three steps of 6e-4 in [−1, 1]


def test_each_number_of_images_takes_the_first_subgroups_of_the_same_pool(plan: Plan[CompareConfig], tiny_run: Run):
    for name in ("dit", "dit_im", "minimax"):
        small, large = (read_set(plan.sets[f"{name} K={k}"].images.artifact(tiny_run.storage))[0] for k in (1, 2))
        assert torch.equal(small, large[::2])


def test_students_and_classes_that_were_finished_are_kept(plan: Plan[CompareConfig], tiny_run: Run):
    """As if the run had been killed with one student and one class of each stage to go."""
    storage = tiny_run.storage
    context: Any = Context(plan.config, storage, plan.classes, None)
    scored = plan.sets["cao2 K=2"]
    students = scored.rows["hard/convnet-3"]
    for stage in (one(plan, "modes", "2 modes"), scored.images, students):
        artifact, before = stage.artifact(storage), stage.manifest(storage) or {}
        folder = Path(artifact.address)
        lost = stage.units[-1]
        if stage is students:
            units = {unit: entry for unit, entry in before["units"].items() if unit != lost}
            artifact.commit({**before, "units": units})
        else:
            (folder / "manifest.json").unlink()
        for file in (folder / "shards").glob(f"{lost}*"):
            file.unlink()
        kept = {file: file.stat().st_mtime_ns for file in (folder / "shards").iterdir()}
        assert kept
        stage.look_again(storage)
        stage.run(context)
        assert {file: file.stat().st_mtime_ns for file in kept} == kept
        after = stage.manifest(storage) or {}
        assert before.get("content") == after.get("content")
        for unit in stage.units:
            first, second = ({k: v for k, v in m["units"][unit].items() if k != "seconds"} for m in (before, after))
            assert first == second
