"""The ground floor is tensors in, tensors out: no Ray, no MLflow, no DeepSpeed."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("ims3_ray").origin).parent
GROUND_FLOOR = ("data", "models", "diffusion", "objectives", "selection", "synthesis", "training")
UPSTAIRS = {"ray", "mlflow", "deepspeed"}
FILES = sorted(file for folder in GROUND_FLOOR for file in (PACKAGE / folder).rglob("*.py"))


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports_of(source: str) -> set[str]:
    """Every module imported anywhere in ``source``, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_reader_of_imports_sees_them_all():
    assert imports_of("import ray.train as r") == {"ray.train"}
    assert imports_of("def f():\n    from ray import data") == {"ray", "ray.data"}


def test_every_room_of_the_ground_floor_has_files():
    assert {file.relative_to(PACKAGE).parts[0] for file in FILES} == set(GROUND_FLOOR)


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_a_ground_floor_file_imports_nothing_from_upstairs(file: Path):
    imports = imports_of(file.read_text())
    assert not {name.split(".")[0] for name in imports} & UPSTAIRS
    assert not {name for name in imports if name.startswith(("ims3_ray.io.artifacts", "ims3_ray.io.storage"))}, (
        "storage is upstairs"
    )
    own = {name.split(".")[1] for name in imports if name.startswith("ims3_ray.")}
    beside = {"errors", "seeds", "saving", "component", "io"} | ({"config"} if file.parent.name == "training" else set())
    assert own <= {*GROUND_FLOOR, *beside}


def test_importing_the_whole_ground_floor_loads_nothing_from_upstairs():
    modules = [module_name(file) for file in FILES]
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\nprint(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(modules) <= set(loaded)
    assert not {name.split(".")[0] for name in loaded} & UPSTAIRS


def test_what_workers_import_with_a_stage_loads_none_of_the_slow_packages():
    """Each of the many processes of a run imports the stages: Ray Train alone would cost each of them a second of CPU time."""
    stages = [module_name(file) for file in (PACKAGE / "stages").glob("*.py") if file.stem != "finetune_worker"]
    code = f"import importlib, sys\nfor m in {stages}: importlib.import_module(m)\nprint(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(stages) <= set(loaded)
    slow = ("ray.train", "ray.data", "deepspeed", "diffusers", "matplotlib", "mlflow", "pandas", "scipy", "timm", "torchvision")
    assert not set(slow) & set(loaded)


def room_of(module: str) -> str:
    """The package below ``ims3_ray`` that a module is in, or the module itself."""
    return module.split(".")[1] if "." in module else "__init__"


def room_graph() -> dict[str, set[str]]:
    """Room → the rooms that its files import, anywhere in them."""
    found: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        mine = room_of(module_name(file))
        names = {name for name in imports_of(file.read_text()) if name.startswith("ims3_ray.")}
        others = {room_of(name) for name in names if importlib.util.find_spec(".".join(name.split(".")[:2])) is not None}
        found.setdefault(mine, set()).update(others - {mine})
    return found


def test_no_import_runs_in_a_circle_between_rooms():
    graph = room_graph()
    assert {"engine", "stages", "plan"} <= graph["search"]
    for room in graph:
        reached, to_visit = set[str](), [room]
        while to_visit:
            for other in graph.get(to_visit.pop(), set()) - reached:
                reached.add(other)
                to_visit.append(other)
        assert room not in reached, f"{room} is imported by something that it imports"


def test_no_code_outside_of_its_file_asks_for_a_kind_of_stage_by_name():
    """The engine, plans, searches and reports take stages as they are."""
    for room in ("engine", "plan", "search", "report"):
        for file in (PACKAGE / room).rglob("*.py"):
            assert not re.search(r"\.(kind|name) (==|!=|in|not in) [^n]", file.read_text()), file
