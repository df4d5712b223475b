"""Plugins as modules: what their sources are to keys, and how workers are given them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ims3_ray import plugins
from ims3_ray.errors import UserError

SELECTOR = """
from ims3_ray.selection import ClassSelector

class Mine(ClassSelector):
    name = "{name}"
    def images(self, images, k): ...
    def cost(self, images, sets_SK): ...
"""


def in_a_process_of_its_own(code: str, folder: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_component_of_a_plugin_is_hashed_by_its_own_source(tmp_path: Path):
    for name in ("pa", "pb"):
        (tmp_path / f"{name}.py").write_text(SELECTOR.format(name=name))
    code = (
        "from ims3_ray import plugins; plugins.load(['pa.py', 'pb.py'])\n"
        "from ims3_ray.selection import SELECTORS; a, b = SELECTORS['pa'], SELECTORS['pb']\n"
        "print(plugins.hashes(a, b, SELECTORS['first'])); print(plugins.hashes(SELECTORS['first'], None))"
    )
    both, none = in_a_process_of_its_own(code, tmp_path).splitlines()
    assert both.count("ims3_plugins.pa.Mine") == both.count("ims3_plugins.pb.Mine") == 1
    assert none == "{}"
    (tmp_path / "pa.py").write_text(SELECTOR.format(name="pa") + "# changed\n")
    assert in_a_process_of_its_own(code, tmp_path).splitlines()[0] != both


def test_a_worker_without_the_files_unpickles_what_a_module_in_a_package_defines(tmp_path: Path):
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "thing.py").write_text(SELECTOR.format(name="thing"))
    driver = (
        "import pickle, sys; sys.path.insert(0, '.')\n"
        "from ims3_ray import plugins; plugins.load(['mine.deep.thing'])\n"
        "from ims3_ray.selection import SELECTORS\n"
        "env = plugins.runtime_env()['env_vars'][plugins.VARIABLE]\n"
        "print(env, pickle.dumps(SELECTORS['thing']()).hex())"
    )
    packed, pickled = in_a_process_of_its_own(driver, tmp_path).split()
    worker = (
        f"import os, pickle; os.environ['IMS3_PLUGINS'] = {packed!r}\n"
        "from ims3_ray import plugins; plugins.load_in_worker()\n"
        f"print(type(pickle.loads(bytes.fromhex({pickled!r}))).__module__)\n"
        "from ims3_ray.selection import SELECTORS; print('thing' in SELECTORS)"
    )
    (tmp_path / "elsewhere").mkdir()
    assert in_a_process_of_its_own(worker, tmp_path / "elsewhere").split() == ["mine.deep.thing", "True"]


def test_a_package_is_refused_since_its_modules_have_the_components(tmp_path: Path):
    (tmp_path / "mypackage").mkdir()
    (tmp_path / "mypackage" / "__init__.py").write_text("")
    code = (
        "import sys; sys.path.insert(0, '.')\nfrom ims3_ray import plugins\nfrom ims3_ray.errors import UserError\n"
        "try:\n    plugins.load(['mypackage'])\nexcept UserError as error:\n    print(error)"
    )
    assert "plugin 'mypackage' is a package; name the modules in it" in in_a_process_of_its_own(code, tmp_path)


def test_a_plugin_that_ends_the_program_is_an_error(tmp_path: Path):
    (tmp_path / "ending.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(UserError, match=r"fails when it is loaded, line 2 \(SystemExit: 0\)"):
        plugins.load([str(tmp_path / "ending.py")])


def test_a_component_needs_what_there_is():
    from ims3_ray.selection.base import ClassSelector, Selector

    with pytest.raises(UserError, match=r"Odd.needs has 'feature'; it may have 'features', 'references', 'confidence'"):
        type("Odd", (ClassSelector,), {"name": "odd", "needs": frozenset({"feature"})})
    assert "odd" not in Selector.registry


@pytest.mark.parametrize("name", ["resnet-18", "convnet-3", "timm/resnet18"])
def test_a_student_of_a_plugin_cannot_take_the_name_of_another(name: str):
    from ims3_ray.models.students import student

    with pytest.raises(UserError, match=f"there are two students called '{name}'"):
        student(name)(lambda *_: None)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    "line",
    [
        "from ims3_plugins import helper",
        "from ims3_plugins.helper import WEIGHT",
        "from . import helper",
        "import ims3_plugins.helper",
    ],
)
def test_a_component_is_hashed_with_the_plugins_that_its_file_imports(tmp_path: Path, line: str):
    code = (
        "from ims3_ray import plugins; plugins.load(['helper.py', 'between.py', 'mine.py', 'other.py'])\n"
        "from ims3_ray.selection import SELECTORS; found = plugins.hashes\n"
        "print(*found(SELECTORS['mine'], SELECTORS['other'])['plugins'].values())"
    )
    (tmp_path / "helper.py").write_text("WEIGHT = 1\n")
    (tmp_path / "between.py").write_text(line)
    (tmp_path / "mine.py").write_text(f"from ims3_plugins import between\n{SELECTOR.format(name='mine')}")
    (tmp_path / "other.py").write_text(SELECTOR.format(name="other"))
    before = in_a_process_of_its_own(code, tmp_path).split()
    (tmp_path / "helper.py").write_text("WEIGHT = 2\n")
    after = in_a_process_of_its_own(code, tmp_path).split()
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_a_module_that_has_changed_since_it_was_imported_is_refused(tmp_path: Path):
    (tmp_path / "mine.py").write_text(SELECTOR.format(name="mine"))
    code = (
        "import pathlib, sys; sys.path.insert(0, '.')\n"
        "from ims3_ray import plugins; plugins.load(['mine']); plugins.load(['mine'])\n"
        "from ims3_ray.errors import UserError\n"
        "file = pathlib.Path('mine.py'); file.write_text(file.read_text() + '# changed')\n"
        "try: plugins.load(['mine'])\n"
        "except UserError as error: print(error)"
    )
    assert in_a_process_of_its_own(code, tmp_path) == (
        "plugin 'mine' has changed since this process imported it; begin a new process\n"
    )
