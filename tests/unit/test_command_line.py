"""``ims3``: its help, its errors, its configs by name, completion, and the schemas for editors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from ims3_ray import UserError
from ims3_ray.cli import ims3, job
from ims3_ray.commands.configs import described, print_configs
from ims3_ray.commands.schema import schema_of
from ims3_ray.commands.table import COMMANDS
from ims3_ray.config import CompareConfig, RunConfig
from ims3_ray.config.files import CONFIGS, config_names, config_path
from ims3_ray.config.loading import load_config

ROOT = Path(__file__).parents[2]


def test_every_command_is_a_script_too_but_for_those_that_no_cluster_runs():
    assert {file.stem for file in (ROOT / "jobs").glob("*.py")} == COMMANDS.keys() - {"schema", "push", "configs"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_a_command_does_and_every_key_with_its_meaning(name: str, capsys: pytest.CaptureFixture[str]):
    assert ims3([name, "--help"]) == 0
    said = capsys.readouterr().out
    assert COMMANDS[name].text.splitlines()[0] in said
    if name in ("distill", "compare", "sweep"):
        for key in ("selection.alpha=", "sampling.cfg_scale=", "finetune.objectives.inversion_matching.weight="):
            assert f"\n  {key}" in said
        assert ("Seed of all random numbers" in said) == (name == "distill"), "the others have draws instead"
    if name == "convert":
        assert "\n  out=generator.safetensors" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["distil"], "no such command 'distil'; did you mean 'distill'? See ims3 --help"),
        (["distill", "--drun"], "no such option '--drun'; did you mean '--dry-run'? See ims3 distill --help"),
        (["distill", "--config"], "option '--config' requires an argument; see ims3 distill --help"),
        (["distill", "--config", "dmo"], "config 'dmo' cannot be read: there is no such file; did you mean 'demo'?"),
        (["distill", "alpha"], "override 'alpha' is not of the form key=value, as in selection.alpha=0.4"),
        (["artifacts", "lst"], "config action='lst': input should be 'list', 'verify', 'repair' or 'prune'"),
        (["artifacts", "list", "now"], "override 'now' is not of the form key=value, as in"),
        (["push", "source=runs/nowhere", "user/x"], "'runs/nowhere' does not exist"),
        (["push"], "give what to upload and the repository: ims3 push runs/demo user/name"),
        (["convert", "ot=x"], "unknown config key 'ot'; did you mean 'out'?"),
        (["schema", "sweeps"], "no command with a config is called 'sweeps'; did you mean 'sweep'? there is: "),
        (["reproduce", "table-99"], "there is no 'table-99'"),
        (["reproduce", "--small"], "name the table or figure"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert ims3(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"error: {message}")
    assert said.err.count("\n") == 1


def test_without_words_the_program_lists_its_commands(capsys: pytest.CaptureFixture[str]):
    assert ims3([]) == 0
    said = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name} " in said
        assert command.title in said


def test_a_script_says_which_command_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["jobs/compare.py", "--nothing"])
    assert job("compare") == 2
    assert capsys.readouterr().err == "error: no such option '--nothing'; see python jobs/compare.py --help\n"


def test_configs_come_with_the_package_and_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shipped = {str(file.relative_to(CONFIGS)) for file in CONFIGS.rglob("*.yaml")} - {"kuberay/rayjob.yaml"}
    assert shipped == {f"{name}.yaml" for name in config_names()}
    monkeypatch.chdir(tmp_path)
    assert load_config(RunConfig, "demo") == load_config(RunConfig, ROOT / "configs" / "demo.yaml")
    assert load_config(CompareConfig, "configs/compare/ablation.yaml").budgets == (1, 10, 50)
    Path("imagewoof").mkdir()  # data may be called like a config
    assert load_config(RunConfig, "imagewoof") == load_config(RunConfig, ROOT / "configs" / "imagewoof.yaml")
    Path("demo").write_text("name: mine")  # a file of one's own comes first
    assert load_config(RunConfig, "demo").name == "mine"
    with pytest.raises(UserError, match="ims3 configs lists those that come with the package"):
        config_path("zzzzzz")


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("ims3 com", "compare"), ("ims3 distill selection.al", "selection.alpha="), ("ims3 artifacts ver", "verify"),
        ("ims3 distill --config compare/cif", "compare/cifar10"), ("ims3 sweep --dr", "--dry-run"),
    ],
)  # fmt: skip
def test_the_shell_completes_commands_keys_and_configs(words: str, offered: str):
    more = {"_IMS3_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code = "import sys; from ims3_ray.cli import ims3; sys.exit(ims3())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **more}, capture_output=True, text=True)
    assert f"plain,{offered}" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("command", "shipped"),
    [
        ("distill", ("methods/", "own-", "image", "cluster/", "data/", "datasets/", "demo", "cifar10", "fashion-mnist")),
        ("compare", ("compare/",)), ("sweep", ("sweeps/",)), ("pretrain", ("pretrain/",)), ("evaluate", ("protocols/",)),
    ],
)  # fmt: skip
def test_the_schema_fits_every_shipped_config_and_no_misspelt_key(command: str, shipped: tuple[str, ...]):
    schema = schema_of(command)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    names = [name for name in config_names() if name.startswith(shipped)]
    assert names
    for name in names:
        check.validate(yaml.safe_load(config_path(name).read_text()))
    with pytest.raises(jsonschema.ValidationError, match="'storag' was unexpected"):
        check.validate({"storag": "x"})
    with pytest.raises(jsonschema.ValidationError, match="'counts' was unexpected"):
        check.validate({"data": {"counts": 2}})


def test_every_config_is_listed_with_a_sentence(capsys: pytest.CaptureFixture[str]):
    found = dict(described())
    assert found.keys() == {name for name in config_names() if not name.startswith("paper/")}
    assert all(10 < len(meaning) < 300 and "ims3 " not in meaning for meaning in found.values())
    assert found["demo"] == "The demonstration: the embedded Fashion-MNIST at 10 images a class, in minutes of two CPU cores"
    print_configs(["methods/d"])
    printed = capsys.readouterr().out
    assert "methods/dm " in printed
    assert "methods/herding" not in printed
    with pytest.raises(UserError, match="no config has a name that begins with 'x'; ims3 configs lists all of them"):
        print_configs(["x"])
