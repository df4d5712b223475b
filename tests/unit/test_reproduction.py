"""The tables and figures of the paper as runs: how many fine-tunings, pools and students each takes, and how it is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ims3_ray.commands.reproduce import check_runs, reproduce
from ims3_ray.config import CompareConfig, SweepConfig, canonical
from ims3_ray.config.evaluation import for_ipc
from ims3_ray.config.paper import described_names, names, read_reproduction
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.plan.reproduction import Share, described, plan_of, share_of, together
from ims3_ray.report.comparison import comparison_tables
from ims3_ray.report.reproduction import figures_of, markdown_of, printed_mean
from tests.unit.test_comparison import results_of

TAKES = {
    "table-1": (3, 18, 11 * 5 * 3 * 3 + 9),  # 11 methods at 5 budgets, 3 networks, 3 seeds; and Full once
    "table-2": (2, 6, 5 * 3 * 3),
    "table-3": (2, 3, 2 * 6 * 3 * 3),  # hard and soft labels
    "table-4": (1, 2, 48),  # on stand-ins ImageNette's runs hold those of ImageWoof
    "table-5": (2, 4, 108),
    "table-6": (2, 3, 90 + 18),  # CaO2 has two rows
    "table-7": (3, 3, 18),
    "table-8": (1, 1, 6),  # with a single φ all of its columns choose the same
    "table-9": (2, 4, 4),  # of which the times are wanted; each set has a student of one epoch
    "table-10": (2, 4, 24),
    "table-11": (2, 4, 36),
    "table-12": (2, 3, 15),
    "table-13": (2, 3, 24),
    "figure-1": (2, 3, 3),  # of which the maps and images are wanted
    "figure-3": (1, 1, 0),
    "figure-4": (1, 1, 0),
    "figure-5": (2, 2, 0),
    "figure-6": (1, 1, 0),
    "figure-7": (1, 2, 2),
    "figure-8": (2, 2, 2),
    "figure-9": (2, 2, 2),
}
SEARCHES = ("figure-3", "figure-4", "figure-5", "figure-6")
ONE_STUDENT = ("table-9", "figure-1", "figure-7", "figure-8", "figure-9")
"""Table or figure → its fine-tunings, pools and students with stand-ins; students of a search are known only after it."""


@pytest.mark.parametrize("name", sorted(TAKES))
def test_every_table_takes_what_the_paper_describes(name: str, tmp_path: Path):
    assert set(TAKES) == set(names())
    overrides = [f"storage={tmp_path}", "data.classes=[Bag, Sandal]"]
    overrides += ["evaluation.seeds=[0,1,2]"] if name not in ONE_STUDENT else []
    reproduction = read_reproduction(name, overrides, small=True)
    storage = Storage.at(str(tmp_path))
    share = together([share_of(plan_of(config), storage) for config in reproduction.runs.values()])
    counts = share.counts()
    assert tuple(counts[kind][0] for kind in ("fine_tunes", "pools", "evaluations")) == TAKES[name]
    assert all(there == 0 for _, there in counts.values())
    assert (share.most_students > 0) == (name in SEARCHES)
    assert not any(tmp_path.iterdir()), "planning writes nothing"
    for config in reproduction.runs.values():
        assert config.quality.stop_below == 0, "no stand-in ends because its samples of two steps are bad"
        assert not config.cluster.place, "no stand-in waits for a kind of machine"


def test_runs_of_other_classes_share_nothing_but_what_holds_no_class(tmp_path: Path):
    def share(classes: str) -> Share:
        overrides = [f"storage={tmp_path}", f"data.classes={classes}"]
        return share_of(
            plan_of(read_reproduction("table-4", overrides, small=True).runs["imagewoof"]), Storage.at(str(tmp_path))
        )

    one, other = share("[Bag, Sandal]"), share("[Coat, Dress]")
    assert together([one, one]).counts() == one.counts()
    assert together([one, other]).counts()["pools"] == (4, 0)
    encoded = [each for each in together([one, other]).expected.values() if each.stage.name == "encode"]
    assert len(encoded) == 4


def test_the_bound_of_a_search_has_its_students_and_their_hours(tmp_path: Path):
    text = described(read_reproduction("figure-3", [f"storage={tmp_path}"], small=True))
    assert "students at most" in text
    assert text.count("core-hours") == 2, "those of its students, and those of all before"


def test_groups_of_classes_are_fine_tuned_one_by_one(tmp_path: Path):
    overrides = [f"storage={tmp_path}", "finetune.classes_per_group=2"]
    (config,) = read_reproduction("table-5", overrides, small=True).runs.values()
    share = share_of(plan_of(config), Storage.at(str(tmp_path)))
    assert share.counts()["fine_tunes"] == (2 * 5, 0)


def test_every_run_is_a_config_with_the_papers_settings():
    for name in names():
        for run, config in read_reproduction(name).runs.items():
            assert config.name.startswith(f"paper-{name}-{run}")
            assert config.finetune.epochs == 8
            assert config.sampling.steps == 50
            assert config.evaluation.seeds == ((0,) if name in ONE_STUDENT else (0, 1, 2))
            assert (config.finetune.batch_size, config.finetune.lr) == (8, 1e-3)
            assert config.finetune.model_dump()["objectives"]["inversion_matching"]["weight"] == 0.002
            if "rded" in config.evaluation.protocols:
                batch = for_ipc(config.evaluation.protocols["rded"].batch_size, 10)
                assert batch == (100 if name == "table-12" else 50), "RDED's code doubles its batches for 1,000 classes"
            assert isinstance(config, SweepConfig if name in SEARCHES else CompareConfig)
            if isinstance(config, CompareConfig):
                rows = {row for of_arm in config.published.values() for row in of_arm}
                known = {*config.evaluation.rows, *(f"higher/{student}" for _, student in config.evaluation.rows.values())}
                assert rows <= known, "every printed figure has a row of the table"
                assert set(config.published) <= set(config.arms)
                assert {k for of_arm in config.published.values() for row in of_arm.values() for k in row} <= set(
                    config.budgets
                )


def test_the_plan_is_said_with_what_runs_share(tmp_path: Path):
    text = described(read_reproduction("table-4", [f"storage={tmp_path}"], small=True))
    assert text.startswith("table-4: Ablation")
    assert "imagewoof: fine-tunes 1 (0 there), pools 2 (0 there), students 8 (0 there)" in text
    assert "together, each only once: fine-tunes 1 (0 there), pools 2 (0 there), students 16 (0 there)" in text
    assert "table-4" in described_names()


def test_unknown_names_and_overrides_are_one_line():
    with pytest.raises(UserError, match=r"there is no 'table-14'.*table-13"):
        read_reproduction("table-14")
    with pytest.raises(UserError, match="one folder"):
        read_reproduction("table-4", ["name=mine"])
    with pytest.raises(UserError, match=r"finetune\.setps"):
        read_reproduction("table-4", ["finetune.setps=3"])


def test_the_higher_of_two_protocols_is_a_table_of_its_own():
    (config,) = read_reproduction("table-3", ["budgets=[10]"], small=False).runs.values()
    assert isinstance(config, CompareConfig)
    config = config.model_copy(update={"arms": {name: config.arms[name] for name in ("dit", "ims3")}})
    plan, found = results_of(config, {("dit", 10, 0): [50.0, 52.0], ("ims3", 10, 0): [55.0, 56.0]})
    for name, each in found["sets"].items():
        soft = {
            kind: {**value, "mean": value["mean"] + (2 if name.startswith("dit") else -2)}
            for kind, value in each["rows"].pop("hard/convnet-3").items()
        }
        hard = {kind: {**value, "mean": value["mean"] + (-2 if name.startswith("dit") else 2)} for kind, value in soft.items()}
        each["rows"] = {"paper/resnet-18": hard, "rded/resnet-18": soft}
    *tables, higher = comparison_tables(plan, found)
    assert [table["row"] for table in tables] == ["paper/resnet-18", "rded/resnet-18"]
    assert higher["row"] == "higher/resnet-18"
    assert [line["published"] for line in higher["lines"]] == ["54.1 ± 0.4", "56.2 ± 0.6"]
    for line in higher["lines"]:
        means = [one["last"]["mean"] for table in tables for one in table["lines"] if one["arm"] == line["arm"]]
        assert line["last"]["mean"] == max(means)
    reproduction = read_reproduction("table-3")
    results = {"imageidc": {"metric": "accuracy", "tables": [*tables, higher]}}
    text = markdown_of(reproduction, results)
    last = text.strip().splitlines()[-1]
    assert last.startswith("| 10 | higher/resnet-18 | IMS3 (")
    assert f"{higher['lines'][1]['last']['mean'] - 56.2:+.1f} |" in last


def test_curves_of_all_runs_are_one_figure():
    reproduction = read_reproduction("figure-6", ["space.selection.groups=[1,2]"])
    found = {
        name: {
            "metric": "accuracy",
            "points": [
                {"settings": {"selection.groups": g}, "rows": {"paper/resnetap-10": {"last": value, "held_out": value}}}
                for g, value in ((2, {"mean": 41.0, "std": 1.0, "sem": 0.5}), (1, {"mean": 40.0, "std": 1.0, "sem": 0.5}))
            ],
        }
        for name in reproduction.runs
    }  # fmt: skip
    figures = figures_of(reproduction, found)
    assert set(figures) == {"figure-6.png", "figure-6.svg"}
    svg = figures["figure-6.svg"].decode()
    for text in ("10 images a class", "50 images a class", "accuracy on the test split (%)", "<!-- G -->"):
        assert text in svg
    assert "| G | test | held out |" in markdown_of(reproduction, found)
    assert printed_mean("41.8 ± 0.3") == 41.8


def test_runs_that_would_be_refused_are_named_before_any_is_made(tmp_path: Path):
    overrides = [f"storage={tmp_path}", "data.classes=[Bag, Sandal]"]
    table = read_reproduction("table-4", overrides, small=True)
    check_runs(table)
    last = list(table.runs.values())[-1]
    Storage.at(str(tmp_path)).write(f"{last.name}/config.yaml", yaml.safe_dump({**canonical(last), "seed": 5}).encode())
    with pytest.raises(UserError, match=rf"run folder '.*{last.name}' holds another config \(seed: 5 there"):
        reproduce(table)
    with pytest.raises(UserError, match="table-9 has the minutes of one set of each method; leave draws and budgets at one"):
        check_runs(read_reproduction("table-9", [*overrides, "draws=[0,1]"], small=True))
