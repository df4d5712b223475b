"""What --dry-run says of weights that do not exist yet, and of what would refuse the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ims3_ray.commands.jobs import plan_distill
from ims3_ray.config import PretrainConfig, RunConfig, canonical
from ims3_ray.errors import UserError
from ims3_ray.plan import make_plan
from ims3_ray.pretraining.expected import Maker, with_expected_weights
from tests.conftest import tiny_values

GENERATOR = {"patch_size": 4, "hidden_size": 16, "depth": 1, "num_heads": 2, "steps": 10}
ENCODER = {"model_args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8]}}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a config of pretraining for each kind of weights."""
    folder = tmp_path / "configs" / "pretrain"
    folder.mkdir(parents=True)
    (folder / "own-dit.yaml").write_text(yaml.safe_dump({"name": "own-dit", "storage": "weights", "generator": GENERATOR}))
    (folder / "own-phi.yaml").write_text(
        yaml.safe_dump({"name": "own-phi", "storage": "weights", "target": "encoder", "encoder": ENCODER})
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(world: Path, project: Path, **changes: Any) -> RunConfig:
    return RunConfig.model_validate(tiny_values(world, project / "runs", **changes))


def planned(config: RunConfig) -> str:
    return "\n".join(plan_distill(config))


DIT, PHI = "weights/own-dit/own-dit.safetensors", "weights/own-phi/own-phi.safetensors"


def test_a_plan_is_made_with_what_a_pretraining_will_make(tiny_world: Path, project: Path):
    config = config_of(tiny_world, project, generator=DIT, encoder=PHI, evaluation={"teacher": {"weights": PHI}})
    text = planned(config)
    for reference, file in ((DIT, "own-dit.yaml"), (PHI, "own-phi.yaml")):
        line = next(line for line in text.splitlines() if line.startswith("note:") and reference in line)
        command = f"ims3 pretrain --config configs/pretrain/{file} data.path={tiny_world / 'data'} data.size=8"
        assert line.endswith(command)
    with with_expected_weights(config) as expected:
        generate = next(stage for stage in make_plan(expected.config).stages if stage.name == "generate")
        path = generate.weights["generator"].path()
        assert path.is_file()
    assert not path.exists()
    assert sorted(each.name for each in project.iterdir()) == ["configs"]
    with pytest.raises(UserError, match=r"own-dit.safetensors' do not exist; .*ims3 pretrain"):
        make_plan(config)


@pytest.mark.parametrize("size", [8, 28])
def test_a_training_that_has_begun_makes_what_it_began(size: int, tiny_world: Path, project: Path):
    values = {"name": "begun", "storage": "weights", "generator": GENERATOR, "data": {"size": size}}
    begun = PretrainConfig.model_validate(values)
    file = project / "weights" / "begun" / "config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump({**canonical(begun), "data_fingerprints": {}}))
    maker = Maker.of("weights/begun/begun.safetensors")
    assert maker is not None
    assert maker.config == begun
    overrides = {"generator": "weights/begun/begun.safetensors"}
    config = config_of(tiny_world, project, arms={"own": {"title": "Own", "images": "generated", "overrides": overrides}})
    if size == 8:
        assert "generate (pretrained, weights/begun/begun.safetensors)" in planned(config)
    else:
        with pytest.raises(UserError, match="makes 1×28×28 images"):
            planned(config)


def test_a_config_that_cannot_be_read_is_none_that_makes_the_weights(tiny_world: Path, project: Path):
    (project / "configs" / "pretrain" / "mine.yaml").write_text("nonsense: 1")
    planned(config_of(tiny_world, project, generator=DIT))


def test_weights_that_nobody_makes_are_refused(tiny_world: Path, project: Path):
    with pytest.raises(UserError, match=r"weights 'weights/other/other.safetensors' do not exist"):
        planned(config_of(tiny_world, project, generator="weights/other/other.safetensors"))


def test_what_would_refuse_the_run_is_said(tiny_world: Path, project: Path):
    config = config_of(tiny_world, project)
    assert "note" not in planned(config)
    folder = project / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(canonical(config)))
    planned(config)
    with pytest.raises(UserError, match=r"holds another config \(seed: 0 there, 1 here\)"):
        planned(config_of(tiny_world, project, seed=1))
    texts = plan_distill(config_of(tiny_world, project, name="served", tracking={"uri": "http://127.0.0.1:9"}))
    assert "left to compute" in next(texts), "the plan is shown before the run is refused"
    with pytest.raises(UserError, match=r"MLflow at 'http://127.0.0.1:9' does not take the run"):
        next(texts)
    many = config_of(tiny_world, project, name="many", finetune={"batch_size": 512, "trainer": {"num_workers": 512}})
    assert "too small for the plan: it needs 512 CPU (has" in planned(many)
    again = config_of(tiny_world, project, quality={"stop_below": 0.9, "warn_below": 0.9})
    assert "results:" in planned(again), "a run may go on with other limits of quality"
