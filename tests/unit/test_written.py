"""What a user writes for a key that takes text is taken as text, whatever YAML makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ims3_ray.config import PretrainConfig, RunConfig, SweepConfig
from ims3_ray.config.files import read_values
from ims3_ray.config.loading import load_config
from ims3_ray.config.written import typed
from ims3_ray.errors import UserError


def value_of(override: str, tree: Any = RunConfig) -> Any:
    """The value of the key of an override in the config that is built with it."""
    found: Any = load_config(tree, None, [override])
    for part in override.partition("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=1", "1"), ("name=01", "01"), ("name=1e3", "1e3"), ("name=1_000", "1_000"), ("name=0x10", "0x10"),
        ("name=yes", "yes"), ("name=true", "true"), ("name=null", "null"), ("name=2026-01-02", "2026-01-02"),
        ("name='quoted'", "quoted"), ("name=12:30", None),
        ("storage=/data/my données #1", "/data/my données #1"), ("storage=a: b", "a: b"), ("storage=[photos", "[photos"),
        ("storage=- x", "- x"), ("storage=*x", "*x"), ("storage=%x", "%x"), ("storage=@x", "@x"),
        ("selection.alpha=0.4 # strong", 0.4), ("seed= 3 ", 3), ("data.classes= [a, b]", ("a", "b")),
        ("data.path=007", "007"), ("data.classes=[0,1]", ("0", "1")), ("data.classes=[01, 1.0, no]", ("01", "1.0", "no")),
        ("data.test_path=null", None), ("data.test_path=~", None), ("export=null", None),
        ("seed=3", 3), ("finetune.lr=1e-3", 0.001), ("finetune.flip=true", True), ("finetune.flip=yes", True),
        ("data.channels=3", 3), ("selection.alpha=1", 1.0), ("cluster.gpu_price=2", 2.0),
        ("cluster.place={pool: {zone: 1}}", {"pool": {"zone": "1"}}), ("cluster.gpu_price={pool: 2}", {"pool": 2.0}),
        ("pool.per_class=null", None), ("evaluation.seeds=[1, 2]", (1, 2)),
    ],
)  # fmt: skip
def test_a_value_is_read_by_the_type_of_its_key(override: str, value: Any):
    if override == "name=12:30":
        with pytest.raises(UserError, match="config name='12:30'"):
            value_of(override)
        return
    assert value_of(override) == value


@pytest.mark.parametrize(
    ("text", "wrong"),
    [("seed=x", "config seed='x'"), ("data.size=[", "is not YAML; quote it"), ("finetune.flip=perhaps", "finetune.flip")],
)
def test_an_impossible_value_is_one_line(text: str, wrong: str):
    with pytest.raises(UserError, match=wrong.replace("[", r"\[")) as refused:
        load_config(RunConfig, None, [text])
    assert "\n" not in str(refused.value)


def test_files_are_read_alike(tmp_path: Path):
    """The names of arms and of sets are keys, which are text, too."""
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: 1\nstorage: 2026-01-02\ndata: {classes: [0, 1, 10]}\nseed: 4\n"
        "arms: {1: {title: 2, images: real, select: random}}\nexport: 1\n",
        "utf-8",
    )
    config = load_config(RunConfig, file)
    assert (config.name, config.storage, config.data.classes) == ("1", "2026-01-02", ("0", "1", "10"))
    assert (config.seed, config.export, config.arms["1"].title) == (4, "1", "2")


@pytest.mark.parametrize("name", ["no", "010", "1e-3", "7", "null", "2026-01-02"])
def test_names_that_are_keys_are_taken_as_written(name: str, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(f"arms: {{{name}: {{title: x, images: real, select: random}}}}\nexport: {name}\n")
    if name == "null":
        return  # the export of no arm
    config = load_config(RunConfig, file)
    assert (name in config.arms, config.export) == (True, name)


def test_files_are_utf_8(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("storage: /data/données\n", "utf-8")
    assert load_config(RunConfig, file).storage == "/data/données"
    file.write_text("storage: /data/données\n", "latin-1")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_config(RunConfig, file)


def test_values_without_a_type_are_what_yaml_reads():
    values = typed(Any, read_values(None, ["space={selection.alpha: [1, 0.5], name: [x, null]}", "budgets={1: 2}"]))
    assert values == {"space": {"selection.alpha": [1, 0.5], "name": ["x", None]}, "budgets": {1: 2}}
    assert load_config(SweepConfig, None, ["space={selection: {alpha: [1, 0.5]}}"]).space


def test_pretraining_reads_alike():
    assert value_of("name=7", PretrainConfig) == "7"
