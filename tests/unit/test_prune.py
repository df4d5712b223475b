"""Which artifacts `jobs/artifacts.py prune` takes for unused."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from pathlib import Path

import pytest

from ims3_ray.commands.artifacts import ArtifactsConfig, run
from ims3_ray.engine.lease import announce
from ims3_ray.errors import IncompletePool, UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage


def artifact(storage: Storage, key: str, age_days: float = 30.0) -> Artifact:
    """A committed artifact whose files are as old as said."""
    made = Artifact(storage, "generate", key * 4)
    made.write("unit.bin", b"x" * 10)
    made.commit({"units": {"unit": {}}, "seconds": 0.0})
    grow_old(Path(storage.uri), age_days)
    return made


def grow_old(folder: Path, age_days: float) -> None:
    then = time.time() - age_days * 86_400
    for file in folder.rglob("*"):
        os.utime(file, (then, then))


def prune(storage: Storage, **more: float) -> None:
    run(ArtifactsConfig.model_validate({"action": "prune", "storage": storage.uri, **more}))


def test_what_results_name_is_used_whoever_has_noted_it(tmp_path: Path):
    """Results of an older version, whose artifacts hold no notes of their users, and records of a sweep's trials."""
    storage = Storage.at(str(tmp_path))
    kept = [artifact(storage, key) for key in ("1111", "2222")]
    gone = artifact(storage, "3333")
    storage.write_json("renamed/results.json", {"stages": [{"key": "1111" * 4}]})
    storage.write_json("search/trials/a-0.json", {"keys": ["2222" * 4]})
    prune(storage)
    assert [one.manifest() is not None and storage.is_folder(one.folder) for one in kept] == [True, True]
    assert not storage.is_folder(gone.folder)


def test_what_a_run_is_making_is_used(tmp_path: Path):
    storage = Storage.at(str(tmp_path))
    making = Artifact(storage, "finetune", "4444" * 4)
    announce(making, "mine", "fine-tune")
    storage.write("mine/config.yaml", b"name: mine")
    grow_old(tmp_path, 30)
    prune(storage, older_than_days=0)
    assert storage.is_folder(making.folder)


def test_a_file_below_makes_an_artifact_young(tmp_path: Path):
    storage = Storage.at(str(tmp_path))
    old = artifact(storage, "5555")
    storage.write(f"{old.folder}/train-0/checkpoint/state.pt", b"x")
    prune(storage)
    assert storage.is_folder(old.folder)


def test_a_folder_without_artifacts_is_an_error(tmp_path: Path):
    for action in ("list", "verify", "repair", "prune"):
        with pytest.raises(UserError, match="holds no artifacts"):
            run(ArtifactsConfig.model_validate({"action": action, "storage": str(tmp_path / "typo")}))


def test_a_damaged_manifest_is_told_and_left_until_it_is_repaired(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    storage = Storage.at(str(tmp_path))
    artifact(storage, "6666")
    manifest = tmp_path / artifact(storage, "7777").folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:9])
    for action in ("list", "verify", "verify"):
        storage.manifests.clear()
        with pytest.raises(IncompletePool, match="1 units or manifests are damaged") if action == "verify" else nullcontext():
            run(ArtifactsConfig.model_validate({"action": action, "storage": storage.uri}))
    said = capsys.readouterr().out
    assert (
        said.count("manifest.json is damaged; units without an intact note are made again")
        == said.count("1 artifacts are intact")
        == 2
    )
    assert "damaged" in said.splitlines()[2]
    with pytest.raises(UserError, match="dry_run=true is for ims3 artifacts prune"):
        run(ArtifactsConfig(action="repair", storage=storage.uri, dry_run=True))
    assert manifest.exists()
    run(ArtifactsConfig(action="repair", storage=storage.uri))
    assert not manifest.exists()
    assert manifest.with_name("manifest.json.damaged").exists()
    run(ArtifactsConfig(action="verify", storage=storage.uri))
