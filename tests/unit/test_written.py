"""What a user writes for a key that takes text is taken as text, whatever YAML makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ims3_ray.config import CompareConfig, EvaluateConfig, PretrainConfig, RunConfig, SweepConfig
from ims3_ray.config.files import read_values
from ims3_ray.config.keys import check_keys
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


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seed: 1\nselection: {alpha: 0.9}\nseed: 2\n", "line 3: 'seed' stands twice; join the two"),
        ("selection: {alpha: 0.9, beta: 1, alpha: 1}\n", "line 1: 'alpha' stands twice"),
        ("finetune: {lr:1e-4}\n", "'lr:1e-4' has no value; write a space after its colon"),
        ("selection.alpha: 0.9\n", "'selection.alpha' is written with dots"),
        ("extend: demo\n", "did you mean 'extends'?"),
        ("budgets: [1]\n", "unknown config key 'budgets'; it is a key of ims3 compare"),
    ],
)
def test_a_file_that_says_something_else_than_it_seems_to_is_refused(tmp_path: Path, text: str, says: str):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        check_keys("RunConfig", read_values(file))
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def test_keys_that_a_file_merges_may_be_set_again(tmp_path: Path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "arms:\n  a: &a {title: A, images: real, select: random}\n  b: {<<: *a, title: B}\n  c: {<<: *a, title: C}\n"
    )
    assert [load_config(RunConfig, file).arms[name].title for name in "abc"] == ["A", "B", "C"]


def test_a_file_extends_the_configs_of_the_package_by_name_from_anywhere(tmp_path: Path):
    (tmp_path / "mine.yaml").write_text("extends: [demo, methods/herding]\nname: mine\n")
    assert "herding" in load_config(RunConfig, tmp_path / "mine.yaml").arms
    (tmp_path / "other.yaml").write_text("extends: demoo\n")
    with pytest.raises(UserError, match="did you mean 'demo'"):
        load_config(RunConfig, tmp_path / "other.yaml")


def test_a_mapping_on_the_command_line_adds_to_what_the_files_say():
    words = ["evaluation.protocols.dsa={validations: 4, normalise: set}", "evaluation={seeds: [5]}"]
    found = load_config(CompareConfig, ["methods/alone", "methods/dm", "protocols/dsa"], words).evaluation
    file = load_config(CompareConfig, ["methods/alone", "methods/dm", "protocols/dsa"]).evaluation
    assert found.protocols["dsa"] == file.protocols["dsa"].model_copy(update={"validations": 4, "normalise": "set"})
    assert found.seeds == (5,)
    place = ["cluster.place={pool: {zone: a}}", "cluster.place={}", "cluster.place={finetune: {zone: b}}"]
    assert load_config(RunConfig, None, place).cluster.place == {"finetune": {"zone": "b"}}
    space = ["space={selection: {alpha: [1, 2]}}", "space={selection: {groups: [3, 5]}}"]
    assert load_config(SweepConfig, None, space).space == {"selection": {"groups": [3, 5]}}


def test_only_what_is_there_can_be_removed():
    assert "dit" not in load_config(RunConfig, None, ["arms.dit=null"]).arms
    assert load_config(EvaluateConfig, None, ["sets={a: x, b: y}", "sets.b=null"]).sets == {"a": "x"}
    twice = load_config(CompareConfig, ["methods/dit", "methods/dm"], ["arms.dm=null", "arms.dm=null"])
    assert list(twice.arms) == ["dit"]
    for override, says in [
        ("arms.dti=null", "no arm is called 'dti'; did you mean 'dit'? there is: random_real, dit, dit_s3, ims3"),
        ("evaluation.protocols.hrad=null", "no protocol is called 'hrad'; did you mean 'hard'?"),
    ]:
        with pytest.raises(UserError) as refused:
            load_config(RunConfig, None, [override])
        assert says in str(refused.value)
    with pytest.raises(UserError, match="no set is called 'b'"):
        load_config(EvaluateConfig, None, ["sets={a: x}", "sets.b=null"])
