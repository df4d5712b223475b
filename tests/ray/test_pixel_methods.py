"""DM, IDC-1, SRe2L and RDED at tiny size: their starts, killed workers, and preparations that sets share."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from ims3_ray import distill, saving
from ims3_ray.config import RunConfig
from ims3_ray.engine.sets import read_set
from ims3_ray.engine.stage import Stage
from ims3_ray.io.storage import Storage
from ims3_ray.plan import make_plan
from ims3_ray.saving import Save
from ims3_ray.seeds import generator_for
from ims3_ray.stages.prepare import Prepare
from ims3_ray.stages.statistics import read_statistics
from ims3_ray.synthesis.base import Given, Inputs, Piece, Synthesis
from ims3_ray.synthesis.dm import DM
from ims3_ray.synthesis.idc import IDC
from ims3_ray.synthesis.rded import RDED, crops_of
from ims3_ray.synthesis.sre2l import SRe2L
from tests.conftest import tiny_values, write_tiny_weights
from tests.ray.conftest import Run

SETTINGS: dict[str, dict[str, Any]] = {
    "dm": {"steps": 6, "width": 4, "batch_size": 8, "lr": 20.0},
    "idc": {"outer": 2, "inner": 3, "width": 4, "batch_size": 8, "lr": 5.0, "training_images": 20, "groups": 2},
    "sre2l": {"steps": 6, "max_roll": 2},
    "rded": {"images_per_class": 20, "crops": 3},
}
REAL = {"images": "real", "select": "random"}
STARTS = {"dm": REAL, "idc": REAL, "sre2l": {"images": "none"}, "rded": {"images": "none"}}


class Killed:
    """Ends its process, as on a machine that is lost: once after the second state of a part and once in the preparation."""

    def at(self, place: str) -> None:
        mark = Path(self.config.marks, place)  # type: ignore[attr-defined]
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def prepare(self, piece: Piece, inputs: Inputs) -> Mapping[str, Tensor]:
        made = super().prepare(piece, inputs)  # type: ignore[misc]
        self.at("piece")
        return made  # type: ignore[no-any-return]

    def make(self, given: Given, state: bytes | None, save: Save) -> Mapping[str, Tensor]:
        saving.SAVE_EVERY_S, count = 0.0, 0

        def saved(data: bytes, done: float = 0.0) -> None:
            nonlocal count
            count += 1
            save(data, done)
            if count == 2:
                assert state is None or state != data
                self.at("part")

        return super().make(given, state, saved)  # type: ignore[misc,no-any-return]


class KilledDM(Killed, DM):
    name = "killed_dm"

    class Config(DM.Config):
        marks: str = Field(default="")


class KilledIDC(Killed, IDC):
    name = "killed_idc"

    class Config(IDC.Config):
        marks: str = Field(default="")


class KilledSRe2L(Killed, SRe2L):
    name = "killed_sre2l"

    class Config(SRe2L.Config):
        marks: str = Field(default="")


class KilledRDED(Killed, RDED):
    name = "killed_rded"

    class Config(RDED.Config):
        marks: str = Field(default="")


def config_of(world: Path, storage: Path, arms: dict[str, Any], synthesis: dict[str, Any], k: int, name: str) -> RunConfig:
    values = tiny_values(world, storage, instability={"images": 0}, arms=arms, synthesis=synthesis, export=None, name=name)
    values["selection"] = {**values["selection"], "images_per_class": k}
    stored = {"width": 4, "epochs": 1, "validations": 1, "pad_to": 16, "normalise": "real"}
    values["evaluation"] = {
        "protocols": {"hard": stored}, "seeds": [0], "val_per_class": 0, "teacher": {"weights": str(world / "phi.safetensors")},
    }  # fmt: skip
    return RunConfig.model_validate(values)


@pytest.fixture(scope="module")
def arms() -> dict[str, Any]:
    return {name: {"title": name, "synthesise": name, **start} for name, start in STARTS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pixel-methods")


@pytest.fixture(scope="module")
def contents(tiny_world: Path, folder: Path, arms: dict[str, Any], cluster: None) -> dict[str, str]:
    """Arm → content hash of its set of two images per class."""
    result = distill(config_of(tiny_world, folder, arms, SETTINGS, 2, "two"))
    return {name: row["content"] for name, row in result.results["sets"].items()}


def test_every_method_makes_a_set_without_a_generator(tiny_world: Path, folder: Path, arms: Any, contents: dict[str, str]):
    config = config_of(tiny_world, folder, arms, SETTINGS, 2, "two")
    plan, storage = make_plan(config), Storage.at(config.storage)
    assert len(set(contents.values())) == 4
    assert not [stage for stage in plan.stages if "generator" in stage.weights]
    for name, scored in plan.sets.items():
        found = read_set(scored.images.artifact(storage))
        assert found.pixels.shape == (6, 1, 8, 8), name
        assert found.pixels.float().std() > 5, name
        assert not [shard for shard in scored.images.artifact(storage).shards() if shard.endswith(".state")]
        assert scored.images.flops + sum(stage.flops for stage in scored.images.inputs.values()) > 0
    real = next(stage for stage in plan.stages if stage.name == "encode" and stage.label == "train")
    (statistics,) = [stage for stage in plan.stages if stage.name == "statistics"]
    mean, std = read_statistics(statistics.artifact(storage))
    firsts = [real.units_of_class(position)[0] for position in range(3)]
    values = torch.cat([_pixels(real, storage, unit) for unit in firsts]).double() / 255
    assert mean.item() == pytest.approx(values.mean().item(), rel=1e-5)
    assert std.item() == pytest.approx(values.std().item(), rel=1e-2)


def _pixels(stage: Stage, storage: Storage, unit: str) -> Tensor:
    from safetensors.torch import load

    return load(stage.artifact(storage).read(f"{unit}.safetensors"))["pixels"]


def test_sets_of_another_size_share_the_preparations(
    tiny_world: Path, folder: Path, arms: dict[str, Any], contents: dict[str, str]
):
    config = config_of(tiny_world, folder, arms, SETTINGS, 1, "one")
    plan, storage = make_plan(config), Storage.at(config.storage)
    prepared = [stage for stage in plan.stages if isinstance(stage, Prepare)]
    assert {stage.label for stage in prepared} == {"dm", "rded"}
    assert not any(stage.missing(storage) for stage in prepared)
    sets = distill(config).results["sets"]
    assert set(sets) == set(contents)


@pytest.mark.slow
def test_workers_that_are_killed_make_the_same_bytes(
    tiny_world: Path, tmp_path: Path, arms: dict[str, Any], contents: dict[str, str]
):
    folders = {name: tmp_path / name for name in arms}
    for folder in folders.values():
        folder.mkdir()
    killed = {name: {**arm, "synthesise": f"killed_{name}"} for name, arm in arms.items()}
    settings = {f"killed_{name}": {**SETTINGS[name], "marks": str(folders[name])} for name in arms}
    sets = distill(config_of(tiny_world, tmp_path / "runs", killed, settings, 2, "killed")).results["sets"]
    assert {name: row["content"] for name, row in sets.items()} == contents
    marks = {name: {mark.name for mark in folder.iterdir()} for name, folder in folders.items()}
    assert marks == {"dm": {"piece", "part"}, "idc": {"part"}, "sre2l": {"part"}, "rded": {"piece"}}


def test_a_generated_set_is_taken_further(tiny_run: Run, tmp_path: Path):
    world = Path(tiny_run.config.generator).parent
    chosen = {"images": "generated", "finetune": True, "select": "s3"}
    further = {
        "ims3": {"title": "IMS3", **chosen},
        "ims3_dm": {"title": "IMS3 + DM", **chosen, "synthesise": "dm"},
        "ims3_idc": {"title": "IMS3 + IDC-1", **chosen, "synthesise": "idc"},
    }
    config = config_of(world, Path(tiny_run.config.storage), further, SETTINGS, 2, "further")
    sets = distill(config).results["sets"]
    mine = tiny_run.result.results["sets"]["ims3"]
    assert sets["ims3"]["content"] == mine["content"]
    assert len({row["content"] for row in sets.values()}) == 3


def test_rded_cuts_its_crops_from_colour_files_of_any_size(tmp_path: Path, cluster: None):
    rng = np.random.default_rng(0)
    for number, name in enumerate(("blue", "green")):
        for split, count in (("train", 6), ("test", 2)):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                photo = rng.integers(0, 120, (40 + index, 60 - index, 3), dtype=np.uint8)
                photo[..., 2 - number] += 130
                Image.fromarray(photo).save(folder / f"{index}.png")
    write_tiny_weights(tmp_path, channels=3, classes=("blue", "green"))
    values = {
        "name": "photos", "storage": str(tmp_path / "runs"), "export": None, "instability": {"images": 0},
        "data": {"path": str(tmp_path / "photos"), "size": 16, "channels": 3}, "selection": {"images_per_class": 2},
        "arms": {"rded": {"title": "RDED", "images": "none", "synthesise": "rded"}},
        "synthesis": {"rded": {"factor": 1, "jpeg": None}},
        "evaluation": {
            "protocols": {"hard": {"width": 4, "epochs": 1, "validations": 1}}, "seeds": [0], "val_per_class": 0,
            "teacher": {"weights": str(tmp_path / "phi.safetensors")},
        },
    }  # fmt: skip
    config = RunConfig.model_validate(values)
    distill(config)
    found = read_set(make_plan(config).sets["rded"].images.artifact(Storage.at(config.storage)))
    for pixels, label in zip(found.pixels, found.labels.tolist(), strict=True):
        folder = tmp_path / "photos" / "train" / ("blue", "green")[label]
        crops = [
            crops_of(Image.open(folder / f"{i}.png"), 16, 5, (0.08, 1.0), generator_for(0, "rded-crops", label, i))
            for i in range(6)
        ]
        assert (torch.cat(crops) == pixels).flatten(1).all(dim=1).any()


def test_synthesis_methods_are_all_here():
    assert {"cao2", "dm", "idc", "rded", "sre2l"} <= set(Synthesis.registry)
