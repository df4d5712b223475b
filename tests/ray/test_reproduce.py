"""Tables and figures of the paper made to the end, on the tiny world, and what they share."""

from __future__ import annotations

from pathlib import Path

import pytest

from ims3_ray.commands.reproduce import reproduce
from ims3_ray.config.paper import Reproduction, read_reproduction
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.plan.reproduction import plan_of, share_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("paper")


def of(name: str, world: Path, storage: Path, *more: str) -> Reproduction:
    overrides = [
        f"storage={storage}", f"data.path={world / 'data'}", "data.classes=null", "data.size=8", "data.unit_size=12",
        f"generator={world / 'dit.safetensors'}", f"encoder={world / 'phi.safetensors'}", "sampling.unit_size=4",
        "finetune.trainer.num_workers=1", "actors.count=1",
        "evaluation.protocols.paper.students=[convnet-3]", "quality={stop_below: 0, warn_below: 0}", *more,
    ]  # fmt: skip
    return read_reproduction(name, overrides, small=True)


def test_a_table_is_made_and_a_second_one_costs_only_what_is_new(tiny_world: Path, storage: Path, cluster: None):
    text = Path(reproduce(of("table-13", tiny_world, storage, "budgets=[1, 2]"))).read_text()
    assert text.startswith("# table-13: Centroids of generated images")
    assert "accuracies and times mean nothing" in text
    lines = [line for line in text.splitlines() if line.startswith("| ") and "convnet-3" in line]
    assert len(lines) == 4 * 2
    (config, _) = of("table-4", tiny_world, storage, "budgets=[1, 2]").runs.values()
    counts = share_of(plan_of(config), Storage.at(str(storage))).counts()
    assert counts["fine_tunes"] == (1, 1)
    assert counts["pools"] == (2, 2)
    with pytest.raises(UserError, match="give an empty storage"):
        reproduce(of("table-9", tiny_world, storage, "budgets=[2]"))


def test_times_are_those_of_the_stages_of_each_arm(tiny_world: Path, tmp_path: Path, cluster: None):
    more = ("arms.mgd3=null", "arms.minimax=null", "budgets=[1]")
    text = Path(reproduce(of("table-9", tiny_world, tmp_path, *more))).read_text()
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ")[1:]
        for line in text.splitlines()
        if " | " in line
    }
    columns = rows["method"]
    ours = {name: dict(zip(columns, map(float, rows[name]), strict=True)) for name in ("DiT", "IMS3")}
    assert ours["DiT"]["fine-tuning"] == 0 < ours["IMS3"]["fine-tuning"]
    for name, found in ours.items():
        assert found["in all"] == pytest.approx(sum(found[column] for column in columns[:-1]), abs=0.21), name
    assert rows["IMS3, printed"][columns.index("fine-tuning")] == "19.5"


def test_figures_show_maps_and_the_curves_of_all_searches(tiny_world: Path, storage: Path, cluster: None):
    text = Path(reproduce(of("figure-1", tiny_world, storage, "budgets=[2]"))).read_text()
    (link,) = [line.partition("](")[2].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert (storage / "paper" / "figure-1-small" / link).resolve().read_text().startswith("<svg")
    more = ("selection.images_per_class=1", "selection.groups=2", "space={selection: {groups: [1, 2]}}")
    text = Path(reproduce(of("figure-6", tiny_world, storage, *more))).read_text()
    assert text.count("| G | test | held out |") == 3
    assert {file.name for file in (storage / "paper" / "figure-6-small").iterdir()} == {
        "table.md",
        "figure-6.png",
        "figure-6.svg",
    }
