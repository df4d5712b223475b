"""What an artifact's key holds: settings that differ from their defaults, so that new options re-key nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import Field

from ims3_ray.component import defaults_of as defaults_of_section
from ims3_ray.config import (
    AugmentConfig,
    EncoderTraining,
    FinetuneConfig,
    ProtocolConfig,
    RunConfig,
    SamplingConfig,
    Section,
    canonical,
    differing,
)
from ims3_ray.engine.folder import check_folder
from ims3_ray.engine.stage import Stage
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.objectives.base import Objective
from ims3_ray.plan import Plan, make_plan
from ims3_ray.selection import Selector
from ims3_ray.stages.evaluate import Evaluate
from ims3_ray.synthesis.base import Synthesis
from tests.conftest import tiny_values

RECORD = Path(__file__).with_name("defaults.json")


def defaults_of(section: type[Any]) -> dict[str, Any]:
    """Default of every option, by its dotted name."""
    found: dict[str, Any] = {}
    for name, value in defaults_of_section(section).items():
        inner = _flat(canonical(value), f"{name}.") if isinstance(value, Section) else {name: json.loads(json.dumps(value))}
        found |= inner
    return found


def _flat(plain: dict[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in plain.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and key != "model_args" else {prefix + key: value}
    return found


def kept_in_keys() -> dict[str, dict[str, Any]]:
    """Version and defaults of every settings class of which keys hold what differs from the defaults."""
    found = {
        name: {"version": kind.version, "defaults": defaults_of(kind.settings)}
        for name, kind in Stage.registry.items()
        if kind.settings is not None
    }
    for registry, kind in ((Selector.registry, "select"), (Synthesis.registry, "synthesise")):
        for name, component in registry.items():
            if component.Config.model_fields:
                version = Stage.registry[kind].version
                found[f"{kind}: {name}"] = {"version": version, "defaults": defaults_of(component.Config)}
    return found


@pytest.mark.parametrize("kind", kept_in_keys())
def test_a_default_changes_with_the_version_alone(kind: str):
    """If this fails: raise ``version`` of that kind of stage (``ims3_ray/stages/KIND.py``) for a default that has changed.
    Then write the defaults anew, which a new option needs too: ``python -m tests.unit.test_keys``."""
    recorded, now = json.loads(RECORD.read_text())[kind], kept_in_keys()[kind]
    if recorded["version"] == now["version"]:
        changed = {key for key, value in recorded["defaults"].items() if now["defaults"].get(key, value) != value}
        assert not changed, f"the defaults of {sorted(changed)} have changed and the version of '{kind}' has not"
    assert now == recorded, "defaults.json does not hold the defaults as they are"


def test_the_record_names_nothing_that_is_no_more():
    assert set(json.loads(RECORD.read_text())) == set(kept_in_keys())


def test_what_differs_is_found_at_every_depth_and_free_tables_are_taken_whole():
    assert differing(SamplingConfig()) == {}
    assert differing(SamplingConfig(steps=7, cfg_scale=2.0)) == {"steps": 7}
    tuned = FinetuneConfig.model_validate({"objectives": {"inversion_matching": {"n_steps": 5}}, "trainer": {"num_workers": 3}})
    assert differing(tuned, without=("trainer",)) == {"objectives": {"inversion_matching": {"n_steps": 5}}}
    # A table that lacks an entry of the default is another table.
    smaller = EncoderTraining(model_args={"layers": [1, 1, 1, 1]})
    assert differing(smaller) == {"model_args": {"layers": [1, 1, 1, 1]}}
    # The default of the outer section counts: its augmentation shifts by 2, that of the class by 0.
    assert differing(ProtocolConfig(augment=AugmentConfig())) == {"augment": {"max_shift": 0}}
    assert differing(ProtocolConfig(augment=AugmentConfig(max_shift=2))) == {}
    for protocol in (ProtocolConfig(epochs={1: 5, 10: 3}), ProtocolConfig(augment=AugmentConfig(flip=True))):
        rebuilt = {**differing(protocol)}
        if "augment" in rebuilt:
            rebuilt["augment"] = {**canonical(ProtocolConfig().augment), **rebuilt["augment"]}
        assert ProtocolConfig.model_validate(rebuilt) == protocol


def test_a_component_that_is_added_later_changes_no_key_until_it_is_used(monkeypatch: pytest.MonkeyPatch):
    """As by a plugin: the default of a fine-tuning was built before it was loaded, other configs after."""

    class Late:
        name = "late"

        class Config(Section):
            weight: float = 0.0

        is_on = staticmethod(lambda config: bool(config.weight))

    before = FinetuneConfig()
    Objective.registry._look()
    monkeypatch.setitem(Objective.registry._found, "late", Late)
    after = FinetuneConfig.model_validate(canonical(before))
    assert "late" in canonical(after)["objectives"]
    for config in (before, after, FinetuneConfig()):
        assert differing(config) == {}
    used = FinetuneConfig.model_validate({"objectives": {"late": {"weight": 0.5}}})
    assert differing(used) == {"objectives": {"late": {"weight": 0.5}}}


class Sampling(SamplingConfig):
    """As it might be after an upgrade."""

    new_option: int = Field(default=3)


def plan_of(world: Path, tmp_path: Path, **changes: Any) -> Plan[RunConfig]:
    return make_plan(RunConfig.model_validate(tiny_values(world, tmp_path, **changes)))


def keys(plan: Plan[RunConfig], tmp_path: Path) -> dict[str, str | None]:
    return {stage.title: stage.key(Storage.at(str(tmp_path))) for stage in plan.stages}


def test_an_option_that_is_added_later_changes_no_key_until_it_is_used(tiny_world: Path, tmp_path: Path):
    before = RunConfig.model_validate(tiny_values(tiny_world, tmp_path))
    values = before.sampling.model_dump()
    expected = keys(make_plan(before), tmp_path)
    after = before.model_copy(update={"sampling": Sampling(**values)})
    used = before.model_copy(update={"sampling": Sampling(**values, new_option=4)})
    assert keys(make_plan(after), tmp_path) == expected
    changed = {title for title, key in keys(make_plan(used), tmp_path).items() if key != expected[title]}
    assert {title for title in changed if title.startswith("generate")} == {t for t in expected if t.startswith("generate")}
    assert "fine-tune" not in changed


@pytest.mark.parametrize(
    "change",
    [
        {"sampling": {"cfg_scale": 3.0}},
        {"finetune": {"objectives": {"inversion_matching": {"similarity": "l2"}}}},
        {"finetune": {"flip": True}},
        {"selection": {"alpha": 0.7}},
        {"seed": 5},
    ],
    ids=str,
)
def test_a_setting_that_is_changed_changes_keys_and_changed_back_gives_them_back(
    change: dict[str, Any], tiny_world: Path, tmp_path: Path
):
    before, after, again = (keys(plan_of(tiny_world, tmp_path, **c), tmp_path) for c in ({}, change, {}))
    assert before == again
    assert before != after


def folder_of(world: Path, tmp_path: Path, remove: str | None = None, **changes: Any) -> tuple[RunConfig, Storage]:
    """A run folder that holds a config without the option ``remove`` (dotted), as an older version wrote it."""
    config, storage = RunConfig.model_validate(tiny_values(world, tmp_path, **changes)), Storage.at(str(tmp_path))
    plain = canonical(config)
    if remove is not None:
        *path, last = remove.split(".")
        inner = plain
        for part in path:
            inner = inner[part]
        del inner[last]
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(plain).encode())
    return config, storage


@pytest.mark.parametrize(
    "option", ["seed", "sampling.compile", "finetune.objectives.minimax.shared", "evaluation.protocols.hard.augment.flip"]
)
def test_a_run_folder_goes_on_after_an_upgrade_that_adds_an_option(option: str, tiny_world: Path, tmp_path: Path):
    check_folder(*folder_of(tiny_world, tmp_path, option))


def test_an_added_option_that_is_used_is_another_config(tiny_world: Path, tmp_path: Path):
    config, storage = folder_of(tiny_world, tmp_path, "sampling.cfg_scale", sampling={"cfg_scale": 3.0})
    with pytest.raises(UserError, match=r"sampling.cfg_scale: 2.0 there, 3.0 here"):
        check_folder(config, storage)


def test_a_run_folder_of_before_refine_had_moved_goes_on(tiny_world: Path, tmp_path: Path):
    arms = {"cao2": {"title": "CaO2", "images": "generated", "select": "confidence", "synthesise": "cao2"}}
    arms["cao2"]["overrides"] = {"synthesis": {"cao2": {"steps": 9}}}
    config, storage = folder_of(tiny_world, tmp_path, arms=arms, export=None)
    plain = canonical(config)
    plain["refine"] = plain.pop("synthesis")["cao2"]
    plain["arms"]["cao2"] |= {"refine": True, "overrides": {"refine": {"steps": 9}}}
    for name in ("synthesise", "labels", "path"):
        del plain["arms"]["cao2"][name]
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(plain).encode())
    check_folder(config, storage)
    plain["refine"]["steps"] = 8
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(plain).encode())
    with pytest.raises(UserError, match=r"synthesis.cao2.steps: 8 there, 100 here"):
        check_folder(config, storage)


def test_settings_of_a_plugin_that_is_no_longer_named_do_not_matter(tiny_world: Path, tmp_path: Path):
    config, storage = folder_of(tiny_world, tmp_path)
    plain = canonical(config)
    plain["synthesis"]["of_a_plugin"] = {"steps": 3}
    plain["finetune"]["objectives"]["of_a_plugin"] = {"weight": 0.0}
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(plain).encode())
    check_folder(config, storage)
    plain["arms"]["ims3"]["synthesise"] = "of_a_plugin"  # but that it was used does
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(plain).encode())
    with pytest.raises(UserError, match=r"arms.ims3.synthesise: 'of_a_plugin' there, None here"):
        check_folder(config, storage)


def test_an_option_that_is_no_more_is_named(tiny_world: Path, tmp_path: Path):
    config, storage = folder_of(tiny_world, tmp_path)
    plain = {**canonical(config), "sampling": {**canonical(config.sampling), "eta": 0.5}}
    storage.write(f"{config.name}/config.yaml", yaml.safe_dump(plain).encode())
    with pytest.raises(UserError, match=r"sampling.eta: 0.5 there, None here"):
        check_folder(config, storage)


def test_a_protocol_that_names_one_setting_of_its_augmentation_keeps_the_others(tiny_world: Path, tmp_path: Path):
    """The key holds what differs; the students are given the protocol itself."""
    protocols = {"hard": {"width": 8, "epochs": 2, "augment": {"flip": True, "max_shift": 2}}}
    plan = plan_of(tiny_world, tmp_path, evaluation={"protocols": protocols, "seeds": [0], "val_per_class": 5})
    (stage, *_) = [stage for stage in plan.stages if isinstance(stage, Evaluate)]
    assert stage.params["protocol"]["augment"] == {"flip": True}
    assert stage.protocol.augment == AugmentConfig(flip=True, max_shift=2)
    assert stage.protocol.students == ("convnet-3",)


def record() -> None:
    RECORD.write_text(json.dumps(kept_in_keys(), indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    record()
