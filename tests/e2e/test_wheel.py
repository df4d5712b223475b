"""The wheel holds all that the program needs: outside the repository, with the libraries of this one, it plans a run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, environment


@pytest.mark.slow
def test_an_installed_wheel_has_its_commands_configs_data_and_weights(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "configs", source / "configs")
    shutil.copytree(ROOT / "ims3_ray", source / "ims3_ray", symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")

    place = tmp_path / "env"
    venv.create(place, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(place)}))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # all others are those of this environment

    def run(*words: str) -> str:
        python = [str(place / "bin" / "python"), *words]
        done = subprocess.run(python, cwd=tmp_path, env=environment(PYTHONPATH=""), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import ims3_ray; print(ims3_ray.__file__)").startswith(str(place))
    assert run("-m", "ims3_ray", "--version").startswith("ims3-ray, version ")
    plan = run("-m", "ims3_ray", "distill", "--config", "demo", "--dry-run")
    assert "generate (fine-tuned)" in plan
    assert plan.splitlines()[-1] == f"results: {tmp_path}/runs/demo"
    assert "table-13" in run("-m", "ims3_ray", "reproduce")
    scripts = [file for file in packages.glob("*.dist-info/entry_points.txt") if "ims3 = ims3_ray.cli:ims3" in file.read_text()]
    assert len(scripts) == 1
