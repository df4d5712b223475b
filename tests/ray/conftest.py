"""One Ray for all tests of this folder, and one run of the tiny world that they look at."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from ims3_ray import RunConfig, RunResult, distill
from ims3_ray.cluster.joining import connected
from ims3_ray.config import ClusterConfig
from ims3_ray.engine.pool import produce
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.io.storage import Storage
from ims3_ray.plan import Plan, make_plan
from ims3_ray.tracking import Tracker
from tests.conftest import tiny_values


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    with connected(ClusterConfig(), {"CPU": 2}):
        yield
    assert not ray.is_initialized()


@dataclass(frozen=True)
class Run:
    config: RunConfig
    result: RunResult
    plan: Plan
    storage: Storage

    @property
    def folder(self) -> Path:
        return Path(self.result.folder)


@pytest.fixture(scope="session")
def tiny_run(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Run:
    """A finished run of all four arms, by two actors and two training workers."""
    config = RunConfig.model_validate(
        tiny_values(
            tiny_world, tmp_path_factory.mktemp("runs"), actors={"count": 2}, finetune={"trainer": {"num_workers": 2}},
            export="ims3",
        )
    )  # fmt: skip
    result = distill(config)
    return Run(config, result, make_plan(config), Storage.at(config.storage))


def copy_of(run: Run, folder: Path) -> RunConfig:
    """The config of a copy of a finished run, with the artifacts that it used, in a storage of its own."""
    name = run.config.name
    used = [Path("artifacts", row["stage"], row["key"]) for row in run.result.results["stages"]]
    for part in (Path(name), *used):
        shutil.copytree(Path(run.config.storage, part), folder / part, dirs_exist_ok=True)
    return run.config.model_copy(update={"storage": str(folder)})


@pytest.fixture(scope="session")
def encoded(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Path:
    """A storage with the images of the tiny world, to begin with."""
    storage = tmp_path_factory.mktemp("encoded")
    context, stages = prepare(tiny_world, storage)
    produce(context, {stages["encode", "train"]: [stages["embed", "train"]], stages["encode", "test"]: []})
    return storage / "artifacts"


def prepare(
    world: Path, storage: Path, encoded: Path | None = None, **changes: Any
) -> tuple[Context, dict[tuple[str, str], Stage]]:
    """A run of which nothing has run yet, but for the images where they are given: its context, its stages by (kind, label)."""
    if encoded is not None:
        shutil.copytree(encoded, storage / "artifacts", dirs_exist_ok=True)
    config = RunConfig.model_validate(tiny_values(world, storage, **changes))
    plan, place = make_plan(config), Storage.at(config.storage)
    stages = {(stage.name, stage.label): stage for stage in plan.stages}
    return Context(config, place, plan.classes, Tracker(config, place)), stages
