"""Files on object storage: a real S3 server on this machine, reached through a door that refuses some requests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ims3_ray.data.sources import open_source
from ims3_ray.errors import UserError
from ims3_ray.io import files
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.files import local_copy
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes
from ims3_ray.io.storage import Storage
from tests.conftest import write_idx_split
from tests.object_storage import SECRET, s3_server, unreliable

BUCKET = "distill"


@pytest.fixture(scope="module")
def server() -> Iterator[dict[str, str]]:
    with s3_server(BUCKET) as environment:
        yield environment


@pytest.fixture
def refused(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every tenth request is refused."""
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    files._remote.cache_clear()
    with unreliable(server["AWS_ENDPOINT_URL"], 10) as (endpoint, found):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield found
    files._remote.cache_clear()


def upload(folder: Path, to: str) -> None:
    storage = Storage.at(to)
    for file in folder.rglob("*"):
        if file.is_file():
            storage.write(str(file.relative_to(folder)), file.read_bytes())


def test_what_is_written_is_read_though_requests_fail(refused: list[str]):
    storage = Storage.at(f"s3://{BUCKET}/runs/")
    large = os.urandom(23 * 2**20)  # sent in parts
    for name, data in (("a/b/c.bin", b"first"), ("a/b/c.bin", b"second"), ("a/large.bin", large), ("a/empty", b"")):
        storage.write(name, data)
    assert storage.read("a/b/c.bin") == b"second"
    assert storage.read("a/large.bin") == large
    assert storage.read("a/empty") == b""
    assert storage.names("a") == {"large.bin", "empty"}
    assert storage.names("nowhere") == set()
    assert (storage.exists("a/large.bin"), storage.exists("a/b"), storage.exists("a/none")) == (True, False, False)
    storage.delete("a/b")
    storage.delete("nowhere")
    storage.delete_file("a/empty")
    assert storage.names("a") | storage.names("a/b") == {"large.bin"}
    assert storage.address("a/large.bin") == f"s3://{BUCKET}/runs/a/large.bin"
    assert refused


def test_an_artifact_is_committed_by_its_manifest(refused: list[str]):
    artifact = Artifact(Storage.at(f"s3://{BUCKET}/committed"), "encode", "0123")
    digest = artifact.write("c0000-u00000.safetensors", b"shard")
    assert artifact.manifest() is None
    assert artifact.shards() == {"c0000-u00000.safetensors"}
    artifact.commit({"units": {"c0000-u00000": digest}})
    assert artifact.manifest() == {"units": {"c0000-u00000": digest}}


def test_sources_are_the_same_there_as_on_a_disk(refused: list[str], tmp_path: Path):
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (5, 4, 3), np.uint8)) for _ in range(5)]
    for number, picture in enumerate(pictures):
        path = tmp_path / "folder" / "train" / ("b", "a/inner")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    (tmp_path / "parquet" / "data").mkdir(parents=True)
    rows = [(encode_png(picture), f"{number}.png", number % 2) for number, picture in enumerate(pictures)]
    (tmp_path / "parquet" / "data" / "train-0.parquet").write_bytes(parquet_bytes(image_table(rows, ["x", "y"])))
    write_idx_split(tmp_path / "idx", "train", 3, seed=0)
    upload(tmp_path, f"s3://{BUCKET}/sources")
    for name in ("folder", "parquet", "idx"):
        there, here = (open_source(f"{root}/{name}", "train") for root in (f"s3://{BUCKET}/sources", tmp_path))
        assert there.class_names == here.class_names
        assert there.labels.tolist() == here.labels.tolist()
        for index in range(len(here.labels)):
            assert there.identify(index) == here.identify(index)
            assert np.array_equal(np.asarray(there.image(index)), np.asarray(here.image(index)))
        assert there.fingerprint == open_source(f"s3://{BUCKET}/sources/{name}", "train").fingerprint
    assert refused


def test_weights_are_copied_once_for_each_state_of_them(
    refused: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage = Storage.at(f"s3://{BUCKET}/weights")
    storage.write("dit.safetensors", b"weights")
    storage.write("vae/config.json", b"{}")
    storage.write("vae/deeper/x.bin", b"12")
    file = local_copy(storage.address("dit.safetensors"))
    assert (file.name, file.read_bytes()) == ("dit.safetensors", b"weights")
    folder = local_copy(storage.address("vae"))
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {"config.json": b"{}", "deeper/x.bin": b"12"}
    written = file.stat().st_mtime_ns
    assert local_copy(storage.address("dit.safetensors")) == file
    assert file.stat().st_mtime_ns == written
    storage.write("dit.safetensors", b"others, longer")
    assert local_copy(storage.address("dit.safetensors")).read_bytes() == b"others, longer"


def test_a_bucket_that_is_not_there_is_named(refused: list[str]):
    with pytest.raises(UserError, match="there is no bucket 'elsewhere'"):
        Storage.at("s3://elsewhere/runs")


def test_a_server_that_does_not_answer_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    files._remote.cache_clear()
    with pytest.raises(UserError, match=r"^'s3://bucket/runs' cannot be reached: ") as error:
        Storage.at("s3://bucket/runs")
    assert "\n" not in str(error.value)
    files._remote.cache_clear()


@pytest.mark.parametrize(
    "uri",
    [f"s3://AKIA:{SECRET}{cut}{SECRET}@bucket/runs" for cut in ("", "/", "#", "?")] + [f"s3://bucket/runs?secret_key={SECRET}"],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri: str):
    for opened in (lambda: Storage.at(uri), lambda: open_source(uri, "train"), lambda: local_copy(uri)):
        with pytest.raises(UserError, match="is given with credentials or options") as error:
            opened()
        assert SECRET not in str(error.value)


def test_other_places_are_reached_by_fsspec():
    with pytest.raises(UserError, match=r"'ftp://127.0.0.1:9/runs' cannot be reached"):
        Storage.at("ftp://127.0.0.1:9/runs")
    with pytest.raises(UserError, match=r"cannot be used to write http://127.0.0.1:9/runs/a; choose another"):
        Storage.at("http://127.0.0.1:9/runs").write("a", b"1")
    storage = Storage.at("memory://place/runs")
    storage.write("a.bin", b"abc")
    assert storage.read("a.bin") == b"abc"
    assert storage.names("") == {"a.bin"}
    with pytest.raises(UserError, match="'nonsense://x' cannot be reached: "):
        Storage.at("nonsense://x")
