"""Sources of many images: what is listed, kept in memory and sent to other processes, and the cache of a machine."""

from __future__ import annotations

import os
import pickle
import random
import re
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ims3_ray.data.sources import folder, open_source, parquet, shared_file
from ims3_ray.errors import UserError
from ims3_ray.io import node_cache
from ims3_ray.io.files import Place, natural
from ims3_ray.io.listing import Listing
from ims3_ray.io.node_cache import cache_folder, cached
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes

CLASSES = ("cat", "dog", "eel")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(value: int) -> bytes:
    return encode_png(Image.fromarray(np.full((4, 4), value, np.uint8)))


def write_classes(root: Path, per_class: int = 3) -> Path:
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            (root / split / name / "deeper").mkdir(parents=True)
            for number in range(per_class):
                place = root / split / name / ("deeper" if number % 2 else ".") / f"{split}{number * 7}.png"
                place.write_bytes(png(40 * label + number))
    return root


def as_lists(path: str) -> tuple[list[list[object]], str]:
    """The order as it is defined: parts of the path one after another, numbers in them as numbers."""
    parts = [re.split(r"(\d+)", part) for part in path.split("/")]
    return [[int(piece) if i % 2 else piece for i, piece in enumerate(part)] for part in parts], path


def test_the_natural_order_is_that_of_its_definition():
    rng = random.Random(0)
    names = ["".join(rng.choice("ab-_. 019/٣é") for _ in range(rng.randrange(1, 9))) for _ in range(3000)]
    names += [f"n{rng.randrange(30)}_{rng.randrange(10 ** rng.randrange(1, 30))}.JPEG" for _ in range(3000)]
    names += [f"{'0' * rng.randrange(3)}{rng.randrange(20)}" for _ in range(100)]
    assert sorted(names, key=natural) == sorted(names, key=as_lists)


def test_a_listing_is_a_sequence_of_the_files_that_are_there(tmp_path: Path):
    root = write_classes(tmp_path) / "train"
    (root / "cat" / ".hidden").write_bytes(b"x")
    (root / "cat" / "gone").symlink_to(root / "nowhere")
    (root / "cat" / "linked.png").symlink_to(root / "cat" / "train0.png")
    found = Listing.below(Place.at(str(root)))
    wanted = [path for path in root.rglob("*") if path.is_file() and path.name != ".hidden"]
    assert [place.path for place in found] == sorted(map(str, wanted), key=natural)
    assert [place.size for place in found] == [os.path.getsize(place.path) for place in found]
    assert [place.path for place in found[2:5]] == [place.path for place in list(found)[2:5]]
    assert found[0].read() == Path(found[0].path).read_bytes()
    assert Listing.of(list(found)).chosen(np.array([3, 1]))[0].path == found[3].path


def test_a_file_in_both_splits_is_found_however_they_were_listed(tmp_path: Path):
    root = write_classes(tmp_path)
    (root / "test" / "dog" / "only.png").write_bytes(b"another image")
    train, test = (open_source(str(root), split) for split in ("train", "test"))
    assert shared_file(train, test) is None
    assert shared_file(train, train) == train.files[0].path
    inside = Listing.below(Place.at(str(root / "train" / "dog")))
    assert inside.first_shared(Listing.of(list(train.files))) == inside[0]
    assert inside.first_shared(Listing.of(test.files)) is None


@pytest.mark.parametrize("limit", [None, 2])
def test_a_process_that_is_sent_a_folder_does_not_list_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
):
    source = open_source(str(write_classes(tmp_path)), "train", limit)
    sent = pickle.dumps(source)
    monkeypatch.setattr(Listing, "below", None)
    monkeypatch.setattr(folder, "concurrently", None)
    got = pickle.loads(sent)
    assert got.labels.tolist() == source.labels.tolist()
    assert got.class_names == source.class_names
    assert got.fingerprint == source.fingerprint
    for index in range(len(source.labels)):
        assert got.identify(index) == source.identify(index)
        assert np.array_equal(np.asarray(got.image(index)), np.asarray(source.image(index)))


def test_a_process_that_is_sent_another_source_opens_it_again(tmp_path: Path):
    (tmp_path / "train.parquet").write_bytes(parquet_bytes(image_table([(png(i), "x.png", i) for i in range(3)], CLASSES)))
    for path in (str(tmp_path), "embedded:fashion-mnist"):
        source = open_source(path, "train", 2)
        sent = pickle.dumps(source)
        assert len(sent) < 1000
        assert pickle.loads(sent).labels.tolist() == source.labels.tolist()


def test_images_of_a_large_parquet_file_are_mapped_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [(png(number), f"{number}.png", number % 3) for number in range(25)]
    files = [tmp_path / f"train-0000{part}-of-00002.parquet" for part in range(2)]
    for part, file in enumerate(files):
        file.write_bytes(parquet_bytes(image_table(rows[part * 10 : 10 + part * 15], CLASSES)))
    small = open_source(str(tmp_path), "train")
    monkeypatch.setattr(parquet, "KEPT_BYTES", 100)
    monkeypatch.setattr(parquet, "ROWS_AT_A_TIME", 4)
    large = open_source(str(tmp_path), "train")
    assert large.fingerprint == small.fingerprint
    assert not cache_folder().exists(), "opening a source decodes nothing"
    for index in random.Random(0).sample(range(25), 25):
        assert np.array_equal(np.asarray(large.image(index)), np.full((4, 4), index))
        assert np.array_equal(np.asarray(small.image(index)), np.full((4, 4), index))
    copies = [path for path in cache_folder().iterdir() if path.suffix == ".arrow"]
    assert len(copies) == 2
    before = [copy.stat().st_ino for copy in copies]
    again = open_source(str(tmp_path), "train")
    assert np.array_equal(np.asarray(again.image(24)), np.full((4, 4), 24))
    assert [copy.stat().st_ino for copy in copies] == before, "a second process maps the same files"
    files[1].write_bytes(parquet_bytes(image_table([(png(99), "x.png", 0)] * 15, CLASSES)))
    changed = open_source(str(tmp_path), "train")
    assert np.array_equal(np.asarray(changed.image(24)), np.full((4, 4), 99)), "a file that has changed is copied anew"


def test_an_entry_of_the_cache_is_made_once_however_many_ask(tmp_path: Path):
    made = []

    def make(path: Path) -> None:
        made.append(path)
        time.sleep(0.2)
        path.write_bytes(b"whole")

    threads = [threading.Thread(target=cached, args=("entry", make, 5, "it")) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert cached("entry", make, 5, "it").read_bytes() == b"whole"
    assert {path.name for path in cache_folder().iterdir()} == {"entry", "entry.lock"}


def test_nothing_of_an_entry_stays_that_could_not_be_made(tmp_path: Path):
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise ConnectionResetError("the other side closed the connection")

    with pytest.raises(ConnectionResetError):
        cached("entry", fail, 5, "it")
    assert {path.name for path in cache_folder().iterdir()} == {"entry.lock"}


def test_a_full_or_forbidden_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"^a copy takes .* GB, and the disk of .* XDG_CACHE_HOME") as refused:
        cached("entry", Path.touch, 10**18, "a copy")
    assert "\n" not in str(refused.value)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be kept in"):
        cached("entry", Path.touch, 1, "a copy")


def test_entries_leave_after_a_week_or_when_space_is_short(monkeypatch: pytest.MonkeyPatch):
    def age(name: str, seconds: float) -> Path:
        path = cached(name, lambda target: target.write_bytes(b"x"), 1, name) and cache_folder() / name
        os.utime(path, (time.time() - seconds,) * 2)
        return path

    old, recent, new = age("old", 8 * 24 * 3600), age("recent", 2 * 3600), age("new", 0)
    cached("next", Path.touch, 1, "next")
    assert [path.exists() for path in (old, recent, new)] == [False, True, True]
    free = iter([0, 0, 0, 100])
    usage = node_cache.shutil.disk_usage(cache_folder())
    monkeypatch.setattr(node_cache.shutil, "disk_usage", lambda _: usage._replace(free=next(free, 100)))
    cached("large", Path.touch, 50, "large")
    assert [path.exists() for path in (recent, new)] == [False, True]


def test_a_million_names_are_columns():
    names = pa.array([f"n{number:08d}.JPEG" for number in range(10_000)], pa.large_string())
    listing = Listing(Place.at("/").filesystem, "/data", names, np.arange(10_000))
    assert len(pickle.dumps((listing.paths, listing.sizes))) < 35 * len(listing)
