"""Storage and artifacts on a local folder, by path and by URI."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import pytest

from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact, key_of
from ims3_ray.io.storage import Storage


@pytest.fixture(params=["path", "uri"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage.at(tmp_path.as_uri() if request.param == "uri" else str(tmp_path))


def test_what_is_written_is_read_by_whoever_gets_the_storage(storage: Storage):
    storage.write("a/b/c.bin", b"first")
    storage.write("a/b/c.bin", b"second")
    assert pickle.loads(pickle.dumps(storage)).read("a/b/c.bin") == b"second"
    assert storage.names("a/b") == {"c.bin"}
    assert storage.exists("a/b/c.bin")
    assert not storage.exists("a/b")


def test_a_file_that_is_being_written_has_no_name_yet(storage: Storage, tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.bin.0a1b2c3d.tmp").write_bytes(b"half")
    assert storage.names("a") == set()
    assert storage.names("nowhere") == set()


def test_a_write_that_fails_leaves_what_was_there(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    storage.write("c.bin", b"whole")

    def full(self: Path, data: bytes) -> int:
        self.open("wb").write(data[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"cannot write .*c\.bin: No space left on device; check storage"):
        storage.write("c.bin", b"other")
    assert storage.read("c.bin") == b"whole"
    assert [p.name for p in tmp_path.iterdir()] == ["c.bin"]


def test_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(UserError, match="cannot write /proc/none"):
        Storage.at("/proc/none").make_folder("run")


def test_an_artifact_is_committed_by_its_manifest(storage: Storage):
    artifact = Artifact(storage, "encode", "0123")
    digest = artifact.write("c0000-u00000.safetensors", b"pixels")
    assert digest == hashlib.sha256(b"pixels").hexdigest()
    assert artifact.shards() == {"c0000-u00000.safetensors"}
    assert artifact.manifest() is None
    artifact.commit({"units": {"c0000-u00000": {"sha256": digest}}})
    assert (artifact.manifest() or {})["units"]["c0000-u00000"]["sha256"] == digest


def test_a_key_changes_with_whatever_it_names_and_not_with_order():
    base = key_of("select", 1, {"k": 10, "alpha": 0.4}, {"images": "a", "embed": "b"})
    assert base == key_of("select", 1, {"alpha": 0.4, "k": 10}, {"embed": "b", "images": "a"})
    others = {
        key_of("embed", 1, {"k": 10, "alpha": 0.4}, {"images": "a", "embed": "b"}),
        key_of("select", 2, {"k": 10, "alpha": 0.4}, {"images": "a", "embed": "b"}),
        key_of("select", 1, {"k": 11, "alpha": 0.4}, {"images": "a", "embed": "b"}),
        key_of("select", 1, {"k": 10, "alpha": 0.4}, {"images": "b", "embed": "a"}),
    }
    assert len(others | {base}) == 5


def test_a_storage_that_cannot_be_read_is_one_line(storage: Storage, monkeypatch: pytest.MonkeyPatch):
    storage.write("a/b.json", b"{}")
    with pytest.raises(FileNotFoundError):
        storage.read("a/c.json")

    class Refusing:
        type_name = "s3"

        def __getattr__(self, name: str) -> Any:
            def refuse(*_: object, **__: object) -> None:
                raise OSError("AWS Error ACCESS_DENIED: the token has expired")

            return refuse

    monkeypatch.setattr(Storage, "filesystem", Refusing())
    for look in (storage.read, storage.exists, storage.names, storage.folders, storage.is_folder):
        with pytest.raises(UserError, match=r"cannot read .*: AWS Error ACCESS_DENIED.*the credentials for it"):
            look("a/b.json")
