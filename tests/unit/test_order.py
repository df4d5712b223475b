"""No order depends on how many names there are, or on how numbers in them sort as text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from ims3_ray.engine.planner import class_units
from ims3_ray.engine.sets import commit_set, read_set, write_class
from ims3_ray.engine.shards import by_class, parse_unit, unit_name
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.files import natural
from ims3_ray.io.storage import Storage


@pytest.mark.parametrize(
    "names",
    [
        [f"class-{number:04d}" for number in (0, 1, 999, 1000, 9_999, 10_000, 10_450, 100_000)],
        [unit_name(label, number) for label in (2, 999, 10_000, 21_840) for number in (0, 99_999, 100_000)],
        ["0", "1", "2", "10", "11", "100"],
        ["train-0.parquet", "train-9.parquet", "train-10.parquet"],
        ["a/2/x", "a/10/x", "b/1/x"],
        ["n01440764", "n01443537", "n15075141"],
        ["1", "01", "x"],
    ],
)
def test_numbers_in_names_are_compared_as_numbers(names: list[str]):
    shuffled = list(names)
    random.Random(0).shuffle(shuffled)
    wanted = sorted(names, key=lambda name: (natural(name)[0], name))
    assert sorted(shuffled, key=natural) == wanted
    if names[0] != "1":
        assert wanted == names


def test_a_set_of_more_than_ten_thousand_classes_keeps_its_labels(tmp_path: Path):
    """ImageNet-21K has 21,841 classes. As text, class-10000 comes before class-1001."""
    artifact = Artifact(Storage.at(str(tmp_path)), "select", "key")
    positions = [0, 1, 999, 1000, 1001, 9_999, 10_000, 10_001]
    units = class_units(10_002)
    entries = {
        units[position]: write_class(artifact, units[position], torch.full((1, 1, 2, 2), index, dtype=torch.uint8))
        for index, position in enumerate(positions)
    }
    commit_set(artifact, entries, 0.0)
    Storage.at(str(tmp_path)).manifests.clear()
    found = read_set(Artifact(Storage.at(str(tmp_path)), "select", "key"))
    assert found.pixels[:, 0, 0, 0].tolist() == found.labels.tolist() == list(range(len(positions)))


def test_units_of_many_classes_belong_to_their_classes():
    units = [unit_name(label, number) for label in (999, 10_000) for number in (99_999, 100_000)]
    assert [parse_unit(unit) for unit in units] == [(999, 99_999), (999, 100_000), (10_000, 99_999), (10_000, 100_000)]
    assert by_class(sorted(units, key=natural)) == {999: units[:2], 10_000: units[2:]}
