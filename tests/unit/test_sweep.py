"""Searches before Ray: spaces, plans, grids of selections against one by one, points from records, the best as a config."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ims3_ray.config import CompareConfig, RunConfig, SweepConfig
from ims3_ray.config.loading import as_yaml, build, load_config
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.plan import make_sweep
from ims3_ray.plan.sweep import after_choice
from ims3_ray.search.publish import best_yaml, figures_of, table_of
from ims3_ray.search.records import Tried, farthest, objective_of, points_of, record_path
from ims3_ray.search.results import describe_sweep, gather_sweep
from ims3_ray.search.tune import Search
from ims3_ray.selection import path, select_subgroups
from ims3_ray.selection.grid import Weighing, most_selections, select_grid, terms_of
from ims3_ray.stages.synthesise import Synthesise
from ims3_ray.tracking import Untracked
from tests.conftest import tiny_values, write_idx_split

LAMBDA = "finetune.objectives.inversion_matching.weight"
GRID = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


def sweep_config(space: dict[str, Any], **values: Any) -> SweepConfig:
    return build(SweepConfig, {"space": space, **values})


# Spaces


def test_what_a_config_says_of_the_space_replaces_all_of_the_default():
    config = load_config(SweepConfig, None, ["space.selection.groups=[2,7]"])
    assert config.values == {"selection.groups": [2, 7]}
    assert set(SweepConfig().values) == {LAMBDA, "selection.alpha", "selection.beta", "selection.groups"}


def test_a_grid_is_the_product_of_its_lists():
    config = sweep_config(
        {"sampling": {"steps": [5, 10], "cfg_scale": [1.0, 2.0, 3.0]}, "selection": {"alpha": GRID, "beta": GRID}}
    )
    assert len(config.outer()) == 6
    assert len(config.inner()) == 81
    assert {tuple(setting.items()) for setting in config.outer()} == {
        (("sampling.steps", steps), ("sampling.cfg_scale", scale)) for steps in (5, 10) for scale in (1.0, 2.0, 3.0)
    }


def test_random_settings_are_the_same_every_time_and_within_their_ranges():
    space = {
        "finetune": {"objectives": {"inversion_matching": {"weight": {"low": 1e-3, "high": 1.0, "log": True}}}},
        "sampling": {"steps": {"low": 5, "high": 9, "integer": True}, "sampler": ["ddim", "ddpm"]},
    }
    config = sweep_config(space, search={"method": "random", "trials": 40})
    drawn = config.outer()
    assert drawn == config.outer()
    assert len(drawn) == 40
    weights = np.array([setting[LAMBDA] for setting in drawn])
    assert weights.min() >= 1e-3
    assert weights.max() <= 1.0
    assert 0.2 < (weights < 10**-1.5).mean() < 0.8  # half of a logarithmic range
    assert {setting["sampling.steps"] for setting in drawn} == {5, 6, 7, 8, 9}
    assert sweep_config(space, search={"method": "random", "trials": 40, "seed": 1}).outer() != drawn


def test_a_small_space_has_no_more_random_settings_than_it_holds():
    config = sweep_config({"sampling": {"steps": [5, 10]}}, search={"method": "random", "trials": 10})
    assert len(config.outer()) == 2


def test_a_point_is_a_distillation_of_the_arm_with_its_settings():
    config = sweep_config({"selection": {"references_per_class": [5, None]}})
    run = config.at({"selection.references_per_class": None, LAMBDA: 0.5}, draw=3)
    assert type(run) is RunConfig
    assert (run.selection.references_per_class, run.finetune.objectives.inversion_matching.weight) == (None, 0.5)
    assert (run.seed, run.export) == (3, "ims3")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"space": {"selection": {"images_per_class": [1, 2]}}}, "selection.images_per_class cannot be swept"),
        ({"space": {"evaluation": {"seeds": [[0]]}}}, "evaluation.seeds cannot be swept"),
        ({"space": {"selection": {"alpha": 0.4}}}, "selection.alpha: 0.4 is no list of values and no range"),
        ({"space": {"selection": {"alpha": []}}}, "no list of values"),
        ({"space": {"selection": {"alpha": {"low": 0.1, "high": 0.9}}}}, "give a list"),
        ({"space": {"selection": {"alpha": [-1]}}}, "space.selection.alpha=-1: "),
        ({"space": {"sampling": {"stepps": [1]}}}, "space.sampling.stepps=1: "),
        ({"space": {"sampling": {"cfg_scale": {"low": 1, "high": 2}}}}, "set search.method to random or optuna"),
        ({"space": {"sampling": {"cfg_scale": {"low": 2, "high": 1}}}}, "sampling.cfg_scale: low=2, high=1 is no range"),
        ({"space": {"sampling": {"cfg_scale": {"low": 0, "high": 1, "log": True}}}}, "no range of logarithms"),
        ({"search": {"method": "optuna"}, "space": {"selection": {"alpha": [1]}}}, "of which space has none"),
        ({"arm": "dit_s3"}, f"{LAMBDA} is swept, but arm 'dit_s3' fine-tunes nothing"),
        ({"arm": "dit"}, "arm='dit' selects by first"),
        ({"selection": {"choose": "worst"}}, "selection.choose: a sweep looks for the best subgroups; leave it out"),
        ({"space": {"selection": {"alpha": [0], "beta": [0]}}}, "alpha and beta are both 0 everywhere in space"),
        ({"space": {"finetune": {"steps": [1, 2], "epochs": [1]}}}, "exclude each other, so that only one"),
        (
            {"space": {"finetune": {"epochs": [1, 4]}}, "arms": {"ims3": {"overrides": {"finetune": {"steps": 50}}}}},
            "arms.ims3.overrides sets finetune.steps, which takes the place of finetune.epochs, which is swept",
        ),
        ({"arm": "gan"}, "arm='gan' is no arm; there is: random_real, dit, dit_s3, ims3"),
        ({"search": {"row": "soft/resnet-18"}}, "search.row='soft/resnet-18' is no row; there is: hard/convnet-3"),
        ({"search": {"early_stopping": True}}, "give several, as in draws=[0, 1, 2]"),
        ({"cluster": {"wait_s": 60}}, "set search.concurrent"),
        ({"evaluation": {"val_per_class": 0}}, "set evaluation.val_per_class"),
        ({"arms": {"ims3": {"overrides": {"selection": {"alpha": 1}}}}}, "arms.ims3.overrides sets selection.alpha, which"),
    ],
)  # fmt: skip
def test_impossible_searches_are_one_line(values: dict[str, Any], says: str):
    with pytest.raises(UserError) as raised:
        build(SweepConfig, values)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_numbers_that_yaml_reads_as_words_are_numbers_and_count_once(tmp_path: Path):
    (tmp_path / "sweep.yaml").write_text(
        "space: {selection: {alpha: [0.1, 1e-1, 1, 1.0, 1e-3]}, sampling: {sampler: [ddim, ddpm]}}"
    )
    config = load_config(SweepConfig, tmp_path / "sweep.yaml")
    assert config.values == {"selection.alpha": [0.1, 1, 0.001], "sampling.sampler": ["ddim", "ddpm"]}


def test_weights_that_are_both_zero_are_no_point():
    config = sweep_config({"selection": {"alpha": [0, 0.5], "beta": [0, 0.5]}})
    assert len(config.inner()) == 3
    assert len(sweep_config({"selection": {"alpha": [0, 0.5]}}).inner()) == 2  # β is what the run has


def test_settings_must_go_together_in_every_trial_but_not_with_what_they_replace(tiny_world: Path, tmp_path: Path):
    def of(n_steps: list[int], grad_steps: list[int]) -> SweepConfig:
        space = {"finetune": {"objectives": {"inversion_matching": {"n_steps": n_steps, "grad_steps": grad_steps}}}}
        return build(SweepConfig, tiny_values(tiny_world, tmp_path, space=space))

    assert len(make_sweep(of([4, 5], [3])).trials) == 2  # the run has n_steps = 2
    with pytest.raises(UserError) as raised:
        make_sweep(of([1, 2], [1, 2]))
    assert str(raised.value).startswith("space: N=1, ")
    assert "is impossible: grad_steps=2 exceeds n_steps=1" in str(raised.value)


# Grids of selections


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    classes=st.integers(2, 5),
    most=st.integers(1, 6),
    coupling=st.sampled_from(["pool", "selected"]),
)
def test_a_grid_finds_what_each_selection_finds(seed: int, classes: int, most: int, coupling: Any):
    rng = torch.Generator().manual_seed(seed)
    candidates = torch.randn(classes, most, 7, generator=rng, dtype=torch.float64) + 1
    references = torch.randn(classes, 7, generator=rng, dtype=torch.float64) + 1
    weighings = [Weighing(a, b, g, coupling) for a in (0.1, 0.4, 0.9) for b in (0.0, 0.2, 0.9) for g in range(1, most + 1)]
    for w, found in zip(weighings, select_grid(candidates, references, weighings), strict=True):
        one = select_subgroups(candidates[:, : w.groups], references, alpha=w.alpha, beta=w.beta, coupling=coupling)
        assert list(found.groups) == one.groups.tolist()
        for mean, table in ((found.proximity, one.proximity_CG), (found.repulsion, one.repulsion_CG)):
            assert mean == pytest.approx(table.gather(1, one.groups[:, None]).mean().item(), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 5), groups=st.integers(1, 6))
def test_no_grid_has_more_outcomes_than_the_bound(seed: int, classes: int, groups: int):
    rng = torch.Generator().manual_seed(seed)
    candidates = torch.randn(classes, groups, 5, generator=rng, dtype=torch.float64)
    references = torch.randn(classes, 5, generator=rng, dtype=torch.float64)
    weighings = [Weighing(a, b, groups) for a in GRID for b in GRID]
    distinct = {found.groups for found in select_grid(candidates, references, weighings)}
    assert len(distinct) <= len(path(candidates, references)) <= classes * (groups - 1) + 1
    assert len(distinct) <= most_selections(weighings, classes) <= classes * (groups - 1) + 1


def test_weights_of_one_ratio_count_once():
    assert len({Weighing(a, b, 3).share for a in GRID for b in GRID}) == 55  # of 81
    assert most_selections([Weighing(a, b, 30) for a in GRID for b in GRID], 10) == 55


def test_terms_are_those_of_the_chosen_groups():
    rng = torch.Generator().manual_seed(0)
    candidates, references = torch.randn(3, 4, 6, generator=rng), torch.randn(3, 6, generator=rng)
    one = select_subgroups(candidates, references, alpha=1.0, beta=0.3)
    ((proximity, repulsion),) = terms_of(candidates, references, [one.groups.tolist()])
    assert 3 * (proximity - 0.3 * repulsion) == pytest.approx(one.objective)


def test_more_groups_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="5 groups are to be weighed of 4"):
        select_grid(torch.randn(2, 4, 3), torch.randn(2, 3), [Weighing(1, 1, 5)])


# Plans


def test_a_plan_counts_what_settings_share(tiny_world: Path, tmp_path: Path):
    space = {
        "finetune": {"objectives": {"inversion_matching": {"weight": [0, 0.002]}}}, "sampling": {"cfg_scale": [1.0, 2.0, 3.0]},
        "selection": {"alpha": GRID, "beta": GRID, "groups": [2, 3], "references_per_class": [5, None]},
    }  # fmt: skip
    values = tiny_values(tiny_world, tmp_path, name="sweep", space=space, draws=[0, 1])
    config = build(SweepConfig, values)
    plan = make_sweep(config)
    assert plan.points == 2 * 3 * 81 * 2 * 2
    kinds = [stage.name for stage in plan.stages]
    assert sorted(kinds) == ["embed", "encode", "encode", "held_out"]  # what no generator has a part in
    stages = {id(stage): stage for trial in plan.trials for stage in trial.stages}.values()
    assert sum(stage.name == "finetune" for stage in stages) == 2 * 2
    pools = [stage for stage in stages if stage.name == "generate"]
    assert len(pools) == 2 * 3 * 2
    assert {stage.images for stage in pools} == {3 * 8}  # G = 3 subgroups of 2 images, in units of 4
    text = describe_sweep(plan)
    # (G − 1)·C + 1 selections by α : β, for two G and two K_i
    assert f"distinct selections: at most {12 * 2 * (4 + 7):,}, students: at most 264·2" in text
    assert "1,944 points (λ_IM 2 × sampling.cfg_scale 3 × α 9 × β 9 × G 2 × K_i 2, 2 draws each), grid" in text
    assert "fine-tunes: 4 (0 there), pools of 24 candidates: 12 (0 there)" in text


def test_choices_among_all_subgroups_are_judged_whatever_the_references_are(tiny_world: Path, tmp_path: Path):
    values = tiny_values(tiny_world, tmp_path, space={"selection": {"groups": [2, 3, 6]}})
    values["selection"]["references"] = "generated"
    (trial,) = make_sweep(build(SweepConfig, values)).trials
    assert trial.judge.run_config.selection.groups == 6
    # candidates that are references are as many as the point has
    assert [(q.stage.run_config.selection.groups, q.inner) for q in trial.questions] == [(2, (0,)), (3, (1,)), (6, (2,))]
    (pool,) = [stage for stage in trial.stages if stage.name == "generate"]
    assert pool.images == 3 * 12


def test_one_pool_of_references_answers_for_every_number_of_groups(tiny_world: Path, tmp_path: Path):
    values = tiny_values(tiny_world, tmp_path, space={"selection": {"groups": [2, 3], "references": ["real", "generated"]}})
    values["pool"] = {"per_class": 8}
    (trial,) = make_sweep(build(SweepConfig, values)).trials
    assert [(q.stage.run_config.selection.groups, len(q.inner)) for q in trial.questions] == [(3, 2), (3, 2)]


def test_a_record_is_of_its_test_split_and_its_students_too(tiny_world: Path, tmp_path: Path):
    space = {"selection": {"alpha": [0.1, 0.9]}}
    values = tiny_values(tiny_world, tmp_path / "runs", space=space)
    storage = Storage.at(str(tmp_path / "runs"))
    keys = make_sweep(build(SweepConfig, values)).trials[0].keys(storage)
    assert make_sweep(build(SweepConfig, values)).trials[0].keys(storage) == keys
    longer = values | {
        "evaluation": {**values["evaluation"], "protocols": {"hard": {"width": 8, "epochs": 5, "validations": 2}}}
    }
    assert make_sweep(build(SweepConfig, longer)).trials[0].keys(storage) != keys
    shutil.copytree(tiny_world / "data", tmp_path / "data")
    write_idx_split(tmp_path / "data", "t10k", 10, seed=77)
    other = values | {"data": {**values["data"], "test_path": str(tmp_path / "data")}}
    assert make_sweep(build(SweepConfig, other)).trials[0].keys(storage) != keys


def test_a_record_is_of_what_is_made_of_the_selections_too(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    values = tiny_values(tiny_world, tmp_path, space={"selection": {"alpha": [0.1, 0.9]}})
    values["arms"] = {"ims3": {"title": "IMS3", "images": "generated", "select": "s3", "synthesise": "cao2"}}
    storage = Storage.at(str(tmp_path))

    def keys(**changes: Any) -> list[str | None]:
        return make_sweep(build(SweepConfig, {**values, **changes})).trials[0].keys(storage)

    before = keys()
    assert keys() == before
    assert keys(synthesis={"cao2": {"steps": 7}}) != before
    monkeypatch.setattr(Synthesise, "version", 99)
    assert keys() != before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"ims3": {"overrides": {"encoder": "x"}}}, "space": {"encoder": ["a", "b"]}}, "overrides sets encoder"),
        ({"stages": {"mine": {}}}, "stages run beside the arms"),
    ],
)
def test_what_would_have_no_effect_is_refused(changes: dict[str, Any], says: str):
    with pytest.raises(UserError, match=says):
        build(SweepConfig, changes)


def test_with_terms_alone_nothing_is_made_of_the_selections(tiny_world: Path, tmp_path: Path):
    values = tiny_values(tiny_world, tmp_path, space={"selection": {"alpha": [0.1, 0.9]}}, search={"by": "s3"})
    values["arms"] = {"ims3": {"title": "IMS3", "images": "generated", "select": "s3", "labels": "soft"}}
    plan = make_sweep(build(SweepConfig, values))
    assert "teacher" not in {stage.name for stage in [*plan.stages, *plan.trials[0].stages]}


def test_without_students_nothing_of_theirs_is_made(tiny_world: Path, tmp_path: Path):
    values = tiny_values(tiny_world, tmp_path, space={"selection": {"alpha": [0.1, 0.9]}}, search={"by": "s3"})
    kinds = [stage.name for stage in make_sweep(build(SweepConfig, values)).stages]
    assert sorted(kinds) == ["embed", "encode"]


# Results


def record(
    settings_: dict[str, Any], draw: int, inner: int, accuracies: list[list[float]], scores: list[float]
) -> dict[str, Any]:
    """Of a trial with ``inner`` points, the first half of which choose selection 0, the others 1."""
    selections = [
        {"groups": [n], "score": score, "content": f"hash-{n}-{draw}", "rows": {"hard/convnet-3": {
            "last": [a + 5 for a in found], "best": [a + 6 for a in found], "val": [a + 4 for a in found], "held_out": found,
        }} if found else {}}
        for n, (found, score) in enumerate(zip(accuracies, scores, strict=True))
    ]  # fmt: skip
    points = [
        {"settings": {}, "selection": int(position >= inner / 2), "proximity": -2.0, "repulsion": -1.0}
        for position in range(inner)
    ]
    stages = [
        {"stage": kind, "title": kind, "key": f"{kind}-{settings_}-{draw}-{n}", "seconds": 1.0, "images": 1}
        for kind, count in (("finetune", 1), ("generate", 1), ("evaluate", 2))
        for n in range(count)
    ]
    return {"settings": settings_, "draw": draw, "keys": ["k"], "selections": selections, "points": points, "stages": stages}


@pytest.fixture
def searched() -> tuple[SweepConfig, list[Tried]]:
    space = {
        "finetune": {"objectives": {"inversion_matching": {"weight": [0.1, 0.2, 0.3]}}},
        "selection": {"alpha": [0.2, 0.8], "beta": [0.5, 0.6], "groups": [2, 3]},
    }
    config = sweep_config(space, draws=[0, 1])
    one, two, three = ({LAMBDA: value} for value in (0.1, 0.2, 0.3))
    return config, [
        Tried(one, [record(one, 0, 8, [[50, 52], [60, 62]], [-1, -2]), record(one, 1, 8, [[54, 56], [58, 60]], [-1, -2])]),
        Tried(two, [record(two, 0, 8, [[80, 80], [10, 10]], [-3, -4])]),
        Tried(three, [], "fine-tuning diverged"),
    ]  # fmt: skip


def test_a_point_has_the_mean_over_draws_and_students(searched: tuple[SweepConfig, list[Tried]]):
    config, (tried, *_) = searched
    points = list(points_of(config, tried))
    assert [point["objective"] for point in points] == [53.0] * 4 + [60.0] * 4
    held_out = points[0]["rows"]["hard/convnet-3"]["held_out"]
    assert held_out["std"] == pytest.approx(np.std([50, 52, 54, 56], ddof=1))
    assert held_out["sem"] == pytest.approx(np.std([51, 55], ddof=1) / np.sqrt(2))  # over draws
    assert points[0]["content"] == ["hash-0-0", "hash-0-1"]
    assert objective_of(config, tried.records) == 60.0
    assert objective_of(config, tried.records[:1]) == 61.0


def test_a_trial_that_was_stopped_is_no_candidate_however_well_it_began(
    searched: tuple[SweepConfig, list[Tried]], tiny_world: Path, tmp_path: Path
):  # fmt: skip
    config, trials = searched
    plan = make_sweep(build(SweepConfig, tiny_values(tiny_world, tmp_path, space=config.space, draws=[0, 1])))
    plan.stages = []
    plan.config = config
    results = gather_sweep(plan, trials, None)  # type: ignore[arg-type]
    assert [trial["status"] for trial in results["trials"]] == ["finished", "stopped after 1", "failed"]
    assert results["best"]["settings"][LAMBDA] == 0.1
    assert results["best"]["objective"] == 60.0
    assert results["failed"] == [{"settings": {LAMBDA: 0.3}, "error": "fine-tuning diverged"}]
    assert results["counts"] == {
        "points": 16, "fine_tunes": 3, "pools": 3, "distinct_selections": 6, "evaluated": 4, "students": 18,
    }  # fmt: skip
    table = table_of(config, results["points"])
    assert len(table) == 16
    assert table[0]["hard/convnet-3/last_mean"] == 58.0
    figures = figures_of(config, results)
    assert set(figures) == {"alpha-beta", "G"}, "only one λ_IM has run all draws"
    for forms in figures.values():
        assert forms["png"].startswith(b"\x89PNG")
        assert b"<svg" in forms["svg"]
    text = best_yaml(config, results)
    (tmp_path / "best.yaml").write_text(text)
    best = load_config(RunConfig, tmp_path / "best.yaml")
    assert best.finetune.objectives.inversion_matching.weight == 0.1
    assert best.selection.alpha == results["best"]["settings"]["selection.alpha"]
    assert best.name == "sweep-best"


def test_of_a_repeated_setting_the_trial_that_came_farthest_counts(searched: tuple[SweepConfig, list[Tried]]):
    _, (whole, stopped, failed) = searched
    again = [Tried(whole.settings, whole.records[:1]), Tried(whole.settings, [], "its process has died")]
    assert farthest([stopped, whole, *again, failed]) == [whole, stopped, failed]
    assert farthest([*again[::-1], stopped]) == [again[0], stopped]


def test_a_trial_whose_draws_are_all_there_counts_as_finished(tiny_world: Path, tmp_path: Path):
    values = tiny_values(tiny_world, tmp_path, draws=[0, 1], space={"sampling": {"cfg_scale": [1.0]}})
    config, storage = build(SweepConfig, values), Storage.at(str(tmp_path / "runs"))
    plan, settings = make_sweep(config), {"sampling.cfg_scale": 1.0}
    search = Search(plan, storage, Untracked())
    for draw in (0, 1):
        storage.write_json(
            record_path(config, settings, draw), {"draw": draw, "keys": plan.trial(settings, draw).keys(storage)}
        )
    assert [record["draw"] for record in search._records(settings, 1)] == [0, 1]
    storage.write_json(record_path(config, settings, 1), {"draw": 1, "keys": ["of other data"]})
    assert [record["draw"] for record in search._records(settings, 1)] == [0]


def test_labels_of_batches_are_among_what_is_made_of_each_selection(tiny_world: Path, tmp_path: Path):
    fkd = {"labels": "stored_batches", "width": 8, "epochs": 2, "validations": 1}
    evaluation = {"teacher": {"weights": str(tiny_world / "phi.safetensors")}, "protocols": {"hard": None, "fkd": fkd}}
    values = tiny_values(tiny_world, tmp_path, evaluation=evaluation, space={"selection": {"alpha": [0.2, 0.8]}})
    plan = make_sweep(build(SweepConfig, values))
    (trial,) = plan.trials
    assert [stage.name for stage in after_choice(trial)] == ["label_batches", "evaluate"]
    labels, students = after_choice(trial)
    storage = Storage.at(str(tmp_path / "runs"))
    assert students.inputs["labels"] is labels
    kept = trial._made_of(students, storage)[-1]
    assert not {"set", "labels"} & kept.keys(), "what depends on the set is no part of a record's keys"
    assert kept.keys() == students.inputs.keys() - {"set", "labels"}


def test_s3s_terms_decide_without_students(searched: tuple[SweepConfig, list[Tried]]):
    config, (tried, *_) = searched
    config = config.model_copy(update={"search": config.search.model_copy(update={"by": "s3"})})
    for each in tried.records:
        for selection in each["selections"]:
            selection |= {"rows": {}, "content": None}
    assert [point["objective"] for point in points_of(config, tried)] == [-1.0] * 4 + [-2.0] * 4


def test_points_without_students_in_one_of_the_draws_decide_nothing(searched: tuple[SweepConfig, list[Tried]]):
    config, (tried, *_) = searched
    tried.records[1]["selections"][1]["rows"] = {}
    assert [point["objective"] for point in points_of(config, tried)] == [53.0] * 4 + [None] * 4
    assert objective_of(config, tried.records) == 53.0
    tried.records[1]["selections"][0]["rows"] = {}
    assert objective_of(config, tried.records) == -np.inf


# The config as YAML


@pytest.mark.parametrize(
    "config",
    [
        RunConfig(),
        build(RunConfig, {"arms": {"dit": None}, "selection": {"alpha": 0.7}, "evaluation": {"seeds": [4]}}),
        build(RunConfig, {"evaluation": {"protocols": {"hard": None, "mine": {"epochs": {1: 5, 10: 3}}}}}),
        build(CompareConfig, {"arms": {"dit": {"title": "DiT", "images": "generated"}}, "budgets": [3]}),
    ],
)  # fmt: skip
def test_a_config_written_as_yaml_is_read_as_the_same(config: RunConfig, tmp_path: Path):
    (tmp_path / "config.yaml").write_text(as_yaml(config))
    assert load_config(type(config), tmp_path / "config.yaml") == config
