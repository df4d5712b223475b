"""Faults inside stages: units that fail, an S3 actor that dies."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from ims3_ray.artifacts import Artifact, Storage
from ims3_ray.config import ActorsConfig
from ims3_ray.selection import select_subgroups
from ims3_ray.stages.base import Stage
from ims3_ray.stages.pool import IncompletePool, _make
from ims3_ray.stages.select import S3Selector, choose_s3, partial_sums
from tests.ray.conftest import Run

UNITS = ["c0000-u00000", "c0000-u00001", "c0001-u00000"]


class FailsAtFirst:
    """Makes a unit of one image; ``bad`` fails as often as there are ``failures``, counted in files."""

    def __init__(self, folder: Path, bad: str, failures: int) -> None:
        self.folder, self.bad, self.failures = folder, bad, failures

    def __call__(self, unit: str) -> tuple[torch.Tensor, list[str]]:
        if unit == self.bad:
            tries = len(list(self.folder.glob("try-*")))
            (self.folder / f"try-{tries}").touch()
            if tries < self.failures:
                raise RuntimeError("no such luck")
        return torch.zeros(1, 1, 2, 2, dtype=torch.uint8), []


class Settings:
    """What of a context ``_make`` reads."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.config = self
        self.actors = ActorsConfig(count=1, max_attempts=2)


def make(folder: Path, failures: int) -> Artifact:
    storage = Storage.at(str(folder))
    stage = Stage("encode", "encode", {"failures": failures}, units=tuple(UNITS), images=3)
    context: Any = Settings(storage)
    try:
        _make(context, partial(FailsAtFirst, folder, UNITS[1], failures), stage, None, UNITS)
    finally:
        manifest = stage.manifest(storage) or {}
        assert {UNITS[0], UNITS[2]} <= manifest["units"].keys()
    return stage.artifact(storage)


def test_a_unit_that_failed_is_tried_again(cluster: None, tmp_path: Path):
    artifact = make(tmp_path, failures=1)
    assert (artifact.manifest() or {})["units"].keys() == set(UNITS)


def test_a_unit_that_always_fails_is_named_and_the_others_are_kept(cluster: None, tmp_path: Path):
    with pytest.raises(IncompletePool, match=rf"1 of 3 units failed every attempt; {UNITS[1]}: RuntimeError: no such luck"):
        make(tmp_path, failures=99)


def test_the_selector_counts_a_contribution_once_however_often_it_comes():
    features = torch.nn.functional.normalize(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double(), dim=-1)
    real = torch.nn.functional.normalize(torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(1)).double(), dim=-1)
    pools = {name: [f"c{c:04d}-u00000" for c in range(2)] for name in ("candidates", "references")}
    selector = S3Selector(dict.fromkeys(pools, (0, 1)), pools, groups=3)
    assert selector.select(0.4, 0.9, "pool") is None
    for _ in range(3):
        for c in range(2):
            selector.put("candidates", pools["candidates"][c], partial_sums(features[c], 0, 1, 3))
            selector.put("references", pools["references"][c], partial_sums(real[c], 0, 1, 1))
    selection = selector.select(0.4, 0.9, "pool")
    expected = select_subgroups(features, real[:, 0], alpha=0.4, beta=0.9)
    assert selection is not None
    assert torch.equal(selection.groups, expected.groups)
    assert selection.objective == pytest.approx(expected.objective)


def test_a_selector_that_dies_half_fed_starts_empty_and_is_fed_again(tiny_run: Run):
    """The stage finds the restarted actor under its name, asks what is missing and goes on."""
    (stage,) = [s for s in tiny_run.plan.stages if (s.kind, s.label) == ("select", "ims3")]
    expected = (stage.manifest(tiny_run.storage) or {})["s3"]
    embed, references = stage.inputs["embed"], stage.inputs["references"]
    s = tiny_run.config.selection
    units = {"candidates": [u for u in embed.units if not u.endswith("u00002")], "references": list(references.units)}
    labels = tiny_run.plan.classes.source_labels
    actor = (
        ray.remote(S3Selector)
        .options(name=f"s3-{stage.key(tiny_run.storage)}", namespace="ims3", num_cpus=0, max_restarts=-1, max_task_retries=-1)
        .remote({"candidates": labels, "references": labels}, units, s.groups)
    )
    ray.get(actor.put.remote("candidates", units["candidates"][0], {0: torch.ones(16).double().numpy()}))
    assert len(ray.get(actor.missing.remote())) == sum(map(len, units.values())) - 1
    ray.kill(actor, no_restart=False)
    deadline = time.monotonic() + 60
    while len(ray.get(actor.missing.remote())) < sum(map(len, units.values())):  # a kill takes effect when it arrives
        assert time.monotonic() < deadline
        time.sleep(0.05)
    context: Any = tiny_run
    selection, table = choose_s3(Shown(context), stage)
    assert table["groups"] == expected["groups"]
    assert selection.objective == pytest.approx(expected["objective"])


class Shown:
    """A run as the context of a stage."""

    def __init__(self, run: Run) -> None:
        self.config, self.storage, self.classes = run.config, run.storage, run.plan.classes
