"""Searches by Ray Tune: what they share, what they find, how they fail and go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mlflow import MlflowClient
from pyarrow import parquet
from safetensors.torch import load

from ims3_ray import RunConfig, SweepConfig, UserError, distill, sweep
from ims3_ray.config.loading import build, load_config
from ims3_ray.engine.shards import by_class
from ims3_ray.engine.stage import Stage
from ims3_ray.errors import IncompletePool
from ims3_ray.io.storage import Storage
from ims3_ray.plan import make_sweep
from ims3_ray.report.terminal import print_sweep
from ims3_ray.selection import centroid, select_subgroups
from tests.conftest import tiny_values, write_tiny_weights
from tests.pages import needs_browser, violations

LAMBDA = "finetune.objectives.inversion_matching.weight"
WEIGHTS = [0.1, 0.5, 0.9]


@dataclass(frozen=True)
class Swept:
    config: SweepConfig
    storage: Path
    results: dict[str, Any]

    @property
    def folder(self) -> Path:
        return self.storage / self.config.name

    def keys(self, kind: str) -> set[str]:
        """Artifacts of a kind."""
        return {path.parent.name for path in self.storage.glob(f"artifacts/{kind}/*/manifest.json")}


@pytest.fixture(scope="module")
def swept(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, encoded: Path) -> Swept:
    """Two λ_IM, of which one diverges, each with every inner setting that there is."""
    storage = tmp_path_factory.mktemp("swept")
    shutil.copytree(encoded, storage / "artifacts")
    other = tmp_path_factory.mktemp("other")
    write_tiny_weights(other, seed=5)
    space = {
        "finetune": {"objectives": {"inversion_matching": {"weight": [0.002, 1e38]}}},
        "encoder": [str(tiny_world / "phi.safetensors"), str(other / "phi.safetensors")],
        "selection": {
            "alpha": WEIGHTS, "beta": WEIGHTS, "groups": [2, 3], "references_per_class": [4, None],
            "coupling": ["pool", "selected"], "references": ["real", "generated"],
        },
    }  # fmt: skip
    tuning = {"steps": 2, "batch_size": 8, "trainer": {"num_workers": 1}}
    brief = {"protocols": {"hard": {"width": 8, "epochs": 1, "validations": 1}}, "seeds": [0]}
    config = build(SweepConfig, tiny_values(tiny_world, storage, name="sweep", space=space, finetune=tuning, evaluation=brief))
    with pytest.raises(IncompletePool) as raised:
        sweep(config)
    said = str(raised.value)
    assert "1 of 2 trials failed" in said
    assert "diverged at step 1" in said
    assert "\n" not in said
    return Swept(config, storage, json.loads((storage / "sweep" / "results.json").read_text()))


def test_trials_that_fail_are_recorded_and_the_others_go_on(swept: Swept):
    assert {t["settings"][LAMBDA]: t["status"] for t in swept.results["trials"]} == {0.002: "finished", 1e38: "failed"}
    (failure,) = swept.results["failed"]
    assert failure["settings"] == {LAMBDA: 1e38}
    assert failure["error"].startswith("fine-tuning diverged at step 1")


def test_every_point_is_had_for_the_price_of_the_distinct_ones(swept: Swept):
    points, counts = swept.results["points"], swept.results["counts"]
    assert len(points) == 2 * 9 * 2 * 2 * 2 * 2
    assert (counts["fine_tunes"], counts["pools"]) == (1, 1)
    assert len(swept.keys("finetune")) == 1
    assert len(swept.keys("generate")) == 1
    distinct = {(point["trial"], *point["content"]) for point in points}
    assert counts["distinct_selections"] <= swept.results["planned"]["most_selections"]
    contents = {content for _, *found in distinct for content in found}
    assert len(swept.keys("evaluate")) == len(contents) == counts["evaluated"]
    assert counts["students"] == len(contents)


def features(stage: Stage, storage: Storage, count: int) -> list[torch.Tensor]:
    """The first so many embeddings of each class."""
    artifact, shards = stage.artifact(storage), by_class(stage.units).values()
    return [torch.cat([load(artifact.read(f"{unit}.safetensors"))["features"] for unit in units])[:count] for units in shards]


def test_a_points_choice_is_that_of_the_embeddings_it_names(swept: Swept):
    """Against Eq. 8–10 from the shards themselves, of all points but those that draw some references at random."""
    storage, checked = Storage.at(str(swept.storage)), 0
    trial = next(t for t in make_sweep(swept.config).trials if t.settings == {LAMBDA: 0.002})
    (path,) = (p for p in swept.folder.glob("trials/*.json") if json.loads(p.read_text())["settings"] == trial.settings)
    record = json.loads(path.read_text())
    for question in trial.questions:
        candidates = features(question.stage.inputs["embed"], storage, 6)
        real = features(question.stage.inputs["references"], storage, 10**6)
        for position in question.inner:
            s, point = trial.configs[position].selection, record["points"][position]
            assert point["settings"] == trial.inner[position]
            if s.references_per_class is not None:
                continue
            groups = torch.stack([torch.stack([centroid(c[2 * g : 2 * g + 2]) for g in range(s.groups)]) for c in candidates])
            every = real if s.references == "real" else [c[: 2 * s.groups] for c in candidates]
            one = select_subgroups(
                groups, torch.stack([centroid(c) for c in every]), alpha=s.alpha, beta=s.beta, coupling=s.coupling
            )  # fmt: skip
            assert record["selections"][point["selection"]]["groups"] == one.groups.tolist()
            checked += 1
    assert checked == len(trial.inner) / 2


def test_the_best_is_a_config_that_distils_the_same_set_from_what_is_there(swept: Swept):
    best = swept.results["best"]
    before = {kind: swept.keys(kind) for kind in ("encode", "embed", "finetune", "generate", "select", "evaluate")}
    config = load_config(RunConfig, swept.folder / "best.yaml")
    result = distill(config)
    assert [result.results["sets"]["ims3"]["content"]] == best["content"]
    held = best["rows"]["hard/convnet-3"]["last"]["mean"]
    assert result.accuracy("ims3") == pytest.approx(held)
    assert {kind: swept.keys(kind) for kind in before} == before
    assert best["objective"] == max(point["objective"] for point in swept.results["points"])


def test_mlflow_has_a_child_for_every_point_and_one_for_every_failure(swept: Swept):
    client = MlflowClient(f"sqlite:///{swept.folder}/mlflow.db")
    parent = client.get_run(swept.results["mlflow"]["run"])
    assert parent.data.params["search.method"] == "grid"
    assert parent.data.metrics["count/points"] == len(swept.results["points"])
    own = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    children = client.search_runs([parent.info.experiment_id], own, max_results=1000)
    assert len(children) == len(swept.results["points"]) + 1
    (failed,) = [run for run in children if run.info.status == "FAILED"]
    assert "diverged" in failed.data.tags["error"]
    wanted = swept.results["points"][7]
    (child,) = [
        run for run in children
        if run is not failed and all(run.data.params[key] == str(value) for key, value in wanted["settings"].items())
    ]  # fmt: skip
    assert child.data.metrics["objective"] == pytest.approx(wanted["objective"], abs=1e-4)
    last = wanted["rows"]["hard/convnet-3"]["last"]["mean"]
    assert child.data.metrics["hard/convnet-3/last_mean"] == pytest.approx(last, abs=1e-4)


def test_files_have_every_point_and_every_figure(swept: Swept):
    table = parquet.read_table(swept.folder / "points.parquet").to_pylist()
    assert len(table) == len(swept.results["points"])
    assert len((swept.folder / "points.csv").read_text().splitlines()) == len(table) + 1
    figures = {path.name for path in (swept.folder / "figures").iterdir()}
    names = ["alpha-beta", "G", "K_i", "phi", "coupling", "references"]
    assert figures == {f"{name}.{form}" for name in names for form in ("png", "svg")}
    report = (swept.folder / "report.html").read_text()
    assert "diverged" in report
    assert report.count("<svg") == len(figures) / 2


def test_a_search_trains_students_with_labels_of_batches(tiny_world: Path, tmp_path: Path, encoded: Path):
    shutil.copytree(encoded, tmp_path / "artifacts")
    fkd = {"labels": "stored_batches", "width": 8, "epochs": 2, "validations": 1, "cutmix": True}
    evaluation = {
        "teacher": {"weights": str(tiny_world / "phi.safetensors")}, "protocols": {"hard": None, "fkd": fkd}, "seeds": [0],
    }  # fmt: skip
    values = tiny_values(
        tiny_world, tmp_path, name="sweep", arm="dit_s3", evaluation=evaluation, space={"selection": {"groups": [1, 2]}}
    )
    found = sweep(build(SweepConfig, values)).results
    assert found["best"]["rows"]["fkd/convnet-3"]["held_out"]["mean"] > 0
    made = {kind: len(list(tmp_path.glob(f"artifacts/{kind}/*/manifest.json"))) for kind in ("label_batches", "evaluate")}
    assert made == {"label_batches": 2, "evaluate": 2}, "of each selection"


@pytest.fixture(scope="module")
def halved(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, encoded: Path) -> Swept:
    """Optuna with ASHA over two draws; students of the best selection of each pool alone."""
    storage = tmp_path_factory.mktemp("halved")
    shutil.copytree(encoded, storage / "artifacts")
    values = tiny_values(
        tiny_world, storage, name="sweep", arm="dit_s3", draws=[0, 1],
        space={
            "sampling": {"cfg_scale": {"low": 1.0, "high": 3.0}},
            "selection": {"alpha": WEIGHTS, "beta": WEIGHTS, "groups": [2, 3]},
        },
        search={
            "method": "optuna", "trials": 2, "by": "both", "screened": 1, "early_stopping": True, "reduction": 2,
            "concurrent": 2,
        },
    )  # fmt: skip
    config = build(SweepConfig, values)
    result = sweep(config)
    print_sweep(result)
    return Swept(config, storage, result.results)


@pytest.mark.slow
def test_optuna_and_early_stopping_spend_draws_on_what_is_ahead(halved: Swept):
    trials = halved.results["trials"]
    assert len(trials) == 2
    assert len({t["settings"]["sampling.cfg_scale"] for t in trials}) == 2
    assert all(1 <= t["settings"]["sampling.cfg_scale"] <= 3 for t in trials)
    assert {t["status"] for t in trials} <= {"finished", "stopped after 1"}
    finished = [t for t in trials if t["status"] == "finished"]
    assert finished
    counts = halved.results["counts"]
    draws = sum(len(t["keys"]) for t in trials)
    assert counts["fine_tunes"] == 0
    assert counts["pools"] == draws
    assert counts["evaluated"] <= draws  # one selection of each


@pytest.mark.slow
def test_a_search_that_has_ended_ends_at_once_and_one_that_has_not_makes_nothing_twice(halved: Swept):
    before = {path: path.stat().st_mtime_ns for path in halved.storage.glob("artifacts/*/*/shards/*")}
    again = sweep(halved.config)
    assert again.results == halved.results
    (halved.folder / "results.json").unlink()  # as if the driver had been killed before it was written
    resumed = sweep(halved.config)
    settings = [t["settings"] for t in resumed.results["trials"]]
    assert settings == [t["settings"] for t in halved.results["trials"]]
    assert {path: path.stat().st_mtime_ns for path in halved.storage.glob("artifacts/*/*/shards/*")} == before


@pytest.mark.slow
def test_another_search_in_the_same_folder_is_refused(halved: Swept):
    plain = yaml.safe_load((halved.folder / "config.yaml").read_text())
    plain["search"]["trials"] = 4
    with pytest.raises(UserError, match=r"holds another config \(search.trials: 2 there, 4 here\)"):
        sweep(SweepConfig.model_validate(plain))


@needs_browser
def test_the_report_breaks_no_rule_of_accessibility(swept: Swept, tmp_path: Path):
    assert violations(swept.folder / "report.html", tmp_path) == []
