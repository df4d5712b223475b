"""Files about the project itself: citation, templates, and what they say of versions."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


def test_the_citation_has_the_version_of_the_package_and_names_the_paper():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (found["version"], found["license"], found["title"]) == (project["version"], project["license"], project["name"])
    assert found["preferred-citation"]["identifiers"] == [{"type": "other", "value": "arXiv:2603.13960"}]
    assert {"cff-version", "message", "authors"} <= found.keys()


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yaml")), ids=lambda file: file.stem)
def test_issue_templates_have_what_a_form_needs(file: Path):
    found = yaml.safe_load(file.read_text())
    assert {"name", "description", "body"} <= found.keys()
    ids = [field["id"] for field in found["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["type"] in ("input", "textarea") and field["attributes"]["label"] for field in found["body"])


def test_checks_before_a_commit_are_those_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().partition("lint: ")[2].partition("\n\n")[0]
    for hook in hooks:
        tool, *rest = hook["entry"].removeprefix(".venv/bin/").split()
        assert f"$(BIN)/{' '.join([tool, *[word for word in rest if not word.startswith('-')]])}" in lint


def test_the_exact_versions_are_within_the_ranges_of_the_project():
    exact = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {pin.name.lower().replace("_", "-"): str(pin.specifier).removeprefix("==") for pin in exact}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for each in map(Requirement, [*project["dependencies"], *extras["text"], *extras["dev"], *extras["docs"]]):
        name = each.name.lower().replace("_", "-")
        assert name == "ims3-ray" or each.specifier.contains(pins[name]), each


def test_the_container_file_has_no_faults_that_a_linter_finds():
    command = [str(Path(sys.executable).with_name("hadolint")), str(ROOT / "configs" / "container" / "Containerfile")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
