"""What a command does before it computes: help and misspelt keys are answered without loading PyTorch or Ray."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ims3_ray import config as package
from ims3_ray.cli import keys_of
from ims3_ray.commands.reference import described_keys, known_keys
from ims3_ray.commands.table import COMMANDS, Command, named
from ims3_ray.config import CompareConfig, RunConfig
from ims3_ray.config.keys import DESCRIBED_KEYS, KNOWN_KEYS, check_keys
from ims3_ray.errors import UserError

ROOT = Path(package.__file__).parents[2]


def test_the_keys_on_record_are_those_of_the_classes():
    """If this fails: ``python -m ims3_ray.commands.reference > docs/configuration.md``, which writes them too."""
    assert Path(package.__file__).with_name(KNOWN_KEYS).read_text() == known_keys()
    assert Path(package.__file__).with_name(DESCRIBED_KEYS).read_text() == described_keys()


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_every_key_has_a_meaning(command: Command):
    keys = list(keys_of(Command(command.title, command.text, named(command.tree), None)))
    assert [key for key, _, meaning in keys if not meaning.strip()] == []
    if isinstance(command.tree, str) and command.tree.startswith("ims3_ray.config:"):
        assert keys == list(keys_of(command))


def test_help_leaves_out_the_options_that_are_refused():
    listed = {name: {key for key, _, _ in keys_of(COMMANDS[name])} for name in ("distill", "compare", "sweep", "pack")}
    assert {"seed", "selection.images_per_class", "data.size"} <= listed["distill"]
    assert not {"seed", "selection.images_per_class"} & listed["compare"]
    assert "seed" not in listed["sweep"]
    assert "data.path" in listed["pack"]
    assert "data.size" not in listed["pack"]


@pytest.mark.parametrize("job", ["distill", "evaluate", "compare", "sweep", "pretrain"])
@pytest.mark.parametrize("argument", ["--help", "storag=x"])
def test_help_and_a_misspelt_key_load_neither_pytorch_nor_ray(job: str, argument: str):
    code = (
        "import runpy, sys, atexit\n"
        "atexit.register(lambda: print('LOADED', *sorted({n.split('.')[0] for n in sys.modules} & {'torch', 'ray', 'timm'})))\n"
        f"sys.argv = ['jobs/{job}.py', {argument!r}]\n"
        f"runpy.run_path('jobs/{job}.py', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "LOADED"
    if argument == "--help":
        assert (done.returncode, "key=value" in done.stdout) == (0, True)
    else:
        assert (done.returncode, done.stderr) == (2, "error: unknown config key 'storag'; did you mean 'storage'?\n")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("sampling.step", "sampling.steps"), ("arms.mine.titel", "arms.mine.title"), ("sampler", "sampling"),
        ("evaluation.protocols.soft.epoch", "evaluation.protocols.soft.epochs"),
        ("finetune.objectives.minimax.memmory", "finetune.objectives.minimax.memory"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_told_with_the_nearest(key: str, near: str):
    values: Any = 1
    for part in reversed(key.split(".")):
        values = {part: values}
    with pytest.raises(UserError, match=rf"^unknown config key '{key}'; did you mean '{near}'\?$"):
        check_keys("RunConfig", values)
    check_keys("RunConfig", {**values, "plugins": ["mine.py"]})  # which may bring the key


@pytest.mark.parametrize("tree", [RunConfig, CompareConfig])
def test_every_shipped_config_has_known_keys(tree: type[RunConfig]):
    for file in (ROOT / "configs" / "methods").glob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        values.pop("extends", None)
        check_keys(tree.__name__, values)


def test_free_tables_take_any_key():
    check_keys("SweepConfig", {"space": {"selection": {"alpha": [1]}}})
    check_keys("RunConfig", {"arms": {"a": {"overrides": {"sampling": {"cfg_scale": 2}}}}, "stages": {"mine": {"x": 1}}})
    check_keys("RunConfig", {"evaluation": {"protocols": {"hard": {"epochs": {1: 300}}}}})


def run_code(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "cwd": ROOT, **options}
    return subprocess.run([sys.executable, "-c", code], **options)


JOB = (
    "import os, sys, time, signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored in what a shell script starts in the background
    "from ims3_ray.cli import main\n"
    "from ims3_ray.component import Section\n"
    "class Config(Section):\n"
    "    name: str = 'x'\n"
)
"""Beginning of a program that runs a job of its own."""


@pytest.mark.parametrize(
    ("signal_name", "code", "said"), [("SIGTERM", 143, "terminated"), ("SIGINT", 130, "interrupted")]
)  # fmt: skip
def test_a_signal_ends_a_command_with_one_line(signal_name: str, code: int, said: str):
    done = run_code(
        f"{JOB}def run(config):\n    os.kill(os.getpid(), signal.{signal_name})\n    [time.sleep(0.1) for _ in range(300)]\n"
        "sys.exit(main('', Config, run, arguments=[]))\n"
    )
    assert (done.returncode, done.stderr, done.stdout) == (code, f"{said}; the same command continues\n", "")


def test_a_reader_that_has_gone_is_no_traceback():
    code = f"{JOB}def run(config):\n    print('x' * 10**6)\nsys.exit(main('', Config, run, arguments=[]))\n"
    done = subprocess.run(
        f'{sys.executable} -c "$CODE" | head -c 1; echo " ${{PIPESTATUS[0]}}"', shell=True, executable="/bin/bash",
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "CODE": code},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("x 141\n", "")


def test_a_terminal_without_greek_letters_shows_question_marks():
    code = f"{JOB}def run(config):\n    print('α : β')\nsys.exit(main('', Config, run, arguments=[]))\n"
    done = run_code(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "? : ?\n", "")
