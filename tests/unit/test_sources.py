"""Image sources, transforms and batches: what is read, what is refused, and in which order it comes."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ims3_ray.commands.pack import PackConfig, pack
from ims3_ray.config import DataConfig
from ims3_ray.config.loading import load_config
from ims3_ray.data.batches import batch_indices, load_pixels
from ims3_ray.data.decoding import Undecodable
from ims3_ray.data.sources import Source, base, copies_noticed, open_source, shared_file
from ims3_ray.data.sources.copies import find_copies
from ims3_ray.data.transforms import to_pil, to_pixels, to_signed, to_uint8
from ims3_ray.errors import UserError
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes
from ims3_ray.seeds import seed_for

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 4), dtype=np.uint8)
LABELS = [1, 0, 2, 1, 0]
NAMES = ["cat", "dog", "eel"]


def idx_bytes(array: np.ndarray, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, pixels: np.ndarray, labels: list[int], zipped: bool = False, prefix: str = "train") -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in (("images-idx3-ubyte", pixels), ("labels-idx1-ubyte", np.array(labels, np.uint8))):
        content = idx_bytes(array)
        file = folder / f"{prefix}-{name}{'.gz' if zipped else ''}"
        file.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
    return folder


def rows(labels: list[int] = LABELS) -> list[tuple[bytes, str, int]]:
    return [
        (encode_png(Image.fromarray(p)), f"{i}.png", label) for i, (p, label) in enumerate(zip(PIXELS, labels, strict=True))
    ]


def write_parquet(folder: Path, name: str = "train.parquet") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(parquet_bytes(image_table(rows(), NAMES)))
    return folder


def write_folder(folder: Path) -> Path:
    for i, label in enumerate(LABELS):
        file = folder / "train" / NAMES[label] / f"{label}{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(Image.fromarray(PIXELS[i])))
    return folder


WRITERS = {
    "idx": lambda folder: write_idx(folder, PIXELS, LABELS),
    "idx.gz": lambda folder: write_idx(folder, PIXELS, LABELS, zipped=True),
    "parquet": write_parquet,
    "parquet in data/": lambda folder: write_parquet(folder, "data/train-00000-of-00001.parquet"),
    "folder": write_folder,
}


def refused(path: Path | str, split: str = "train") -> str:
    with pytest.raises(UserError) as raised:
        open_source(str(path), split)
    message = str(raised.value)
    assert message.strip()
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", WRITERS)
def test_a_source_gives_back_images_and_labels(tmp_path: Path, kind: str):
    source = open_source(str(WRITERS[kind](tmp_path / "set")), "train")
    order = sorted(range(5), key=lambda i: LABELS[i]) if kind == "folder" else range(5)
    assert source.labels.dtype == np.int64
    assert source.labels.tolist() == [LABELS[i] for i in order]
    assert list(source.class_names) == (["0", "1", "2"] if kind.startswith("idx") else NAMES)
    for position, i in enumerate(order):
        assert np.array_equal(np.asarray(source.image(position)), PIXELS[i])
    assert len({source.identify(i) for i in range(5)}) == 5


@pytest.mark.parametrize("kind", WRITERS)
def test_a_limit_takes_the_first_images_of_each_class(tmp_path: Path, kind: str):
    path = str(WRITERS[kind](tmp_path))
    whole, limited = open_source(path, "train"), open_source(path, "train", limit=1)
    first = [whole.labels.tolist().index(label) for label in sorted(set(whole.labels.tolist()))]
    assert len(whole.labels) > len(limited.labels) == len(first)
    for index, of_whole in enumerate(sorted(first)):
        assert limited.labels[index] == whole.labels[of_whole]
        assert limited.identify(index) == whole.identify(of_whole)
        assert np.array_equal(np.asarray(limited.image(index)), np.asarray(whole.image(of_whole)))
    assert limited.fingerprint != whole.fingerprint
    assert limited.fingerprint == open_source(path, "train", limit=1).fingerprint
    assert limited.notices[-1] == f"{len(first)} of {len(whole.labels)} images of '{path}' are used, at most 1 a class"
    assert open_source(path, "train", limit=100).fingerprint == whole.fingerprint, "a limit that leaves all images"


def test_a_limit_hides_no_copy_of_the_training_split(tmp_path: Path):
    path = write_folder(tmp_path)
    shutil.copytree(path / "train", path / "test", dirs_exist_ok=True)
    for limits in ((None, None), (1, 1), (2, 1), (None, 1)):
        train, test = (open_source(str(path), split, limit) for split, limit in zip(("train", "test"), limits, strict=True))
        assert shared_file(train, test) is not None, limits


def write_images(folder: Path, kind: str, pixels: np.ndarray, labels: list[int]) -> Source:
    """A set of these images as a source of this kind."""
    if kind == "idx":
        write_idx(folder, pixels, labels)
    elif kind == "tensors":
        folder.mkdir()
        torch.save(torch.from_numpy(pixels)[:, None], folder / "images.pt")
        torch.save(torch.tensor(labels), folder / "labels.pt")
    elif kind == "parquet":
        folder.mkdir()
        encoded = [(encode_png(Image.fromarray(image)), "", label) for image, label in zip(pixels, labels, strict=True)]
        pq.write_table(image_table(encoded, ["0", "1", "2"]), folder / "train.parquet")
    else:
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            (folder / "train" / str(label)).mkdir(parents=True, exist_ok=True)
            (folder / "train" / str(label) / f"{number}.png").write_bytes(encode_png(Image.fromarray(image)))
    return open_source(str(folder), "train")


@pytest.mark.parametrize("kind", ["folder", "idx", "parquet", "tensors"])
def test_images_that_are_there_twice_are_found(tmp_path: Path, kind: str):
    train = write_images(tmp_path / "a", kind, PIXELS[[0, 1, 2, 0, 2]], [0, 1, 2, 1, 2])
    test = write_images(tmp_path / "b", kind, PIXELS[[3, 1, 2, 4]], [0, 1, 2, 2])
    assert find_copies(train, test) == (2, 2)  # image 0 is in two classes, image 2 twice in one
    assert find_copies(train, test, ["0", "2"]) == (1, 0)
    assert find_copies(test, test, ["0"]) == (1, 0)
    few = open_source(str(tmp_path / "a"), "train", limit=1)
    assert find_copies(few, test) == (2, 0)  # the copy of image 0 is not used
    assert copies_noticed(few, write_images(tmp_path / "c", kind, PIXELS[3:], [0, 1]), "training images") == []


def test_the_test_split_of_idx_files_is_called_t10k(tmp_path: Path):
    write_idx(tmp_path, PIXELS, LABELS)
    write_idx(tmp_path, PIXELS[:2], [2, 1], prefix="t10k")
    assert open_source(str(tmp_path), "test").labels.tolist() == [2, 1]


def test_idx_classes_may_be_named_in_a_file(tmp_path: Path):
    (write_idx(tmp_path, PIXELS, LABELS) / "classes.txt").write_text("cat\ndog\neel\n")
    assert list(open_source(str(tmp_path), "train").class_names) == NAMES


def test_a_single_parquet_file_is_a_source(tmp_path: Path):
    source = open_source(str(write_parquet(tmp_path) / "train.parquet"), "anything")
    assert source.labels.tolist() == LABELS


def test_parquet_shards_are_read_in_the_order_of_their_names(tmp_path: Path):
    for shard, some in enumerate((rows()[:2], rows()[2:])):
        (tmp_path / f"train-{shard}.parquet").write_bytes(parquet_bytes(image_table(some, NAMES)))
    source = open_source(str(tmp_path), "train")
    assert source.labels.tolist() == LABELS
    assert all(np.array_equal(np.asarray(source.image(i)), PIXELS[i]) for i in range(5))
    assert [source.identify(i) for i in (1, 2, 4)] == [
        "train-0.parquet row 1",
        "train-1.parquet row 0",
        "train-1.parquet row 2",
    ]


def test_parquet_without_class_names_numbers_its_classes(tmp_path: Path):
    pq.write_table(image_table(rows(), NAMES).replace_schema_metadata(None), tmp_path / "train.parquet")
    assert open_source(str(tmp_path), "train").class_names == ("0", "1", "2")


def test_parquet_whose_names_cannot_be_read_says_so(tmp_path: Path):
    damaged = image_table(rows(), NAMES).replace_schema_metadata({"huggingface": '{"info": {"featu'})
    pq.write_table(damaged, tmp_path / "train.parquet")
    source = open_source(str(tmp_path), "train")
    assert source.class_names == ("0", "1", "2")
    assert any("metadata of the Hub that cannot be read" in notice for notice in source.notices)


def test_parquet_in_row_groups_gives_the_same_images(tmp_path: Path):
    pq.write_table(image_table(rows(), NAMES), tmp_path / "train.parquet", row_group_size=2)
    source = open_source(str(tmp_path), "train")
    assert all(np.array_equal(np.asarray(source.image(i)), PIXELS[i]) for i in range(5))


def test_a_hub_id_is_read_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """CIFAR-10 as the hub has it: shards in a folder named after the configuration, images in a column `img`."""
    from huggingface_hub import constants

    snapshot = tmp_path / "datasets--uoft-cs--cifar10" / "snapshots" / ("0" * 40)
    (snapshot / "plain_text").mkdir(parents=True)
    (tmp_path / "datasets--uoft-cs--cifar10" / "refs").mkdir()
    (tmp_path / "datasets--uoft-cs--cifar10" / "refs" / "main").write_text("0" * 40)
    table = image_table(rows(), NAMES)
    table = table.rename_columns(["img", "label"]).replace_schema_metadata(table.schema.metadata)
    for split in ("train", "test"):
        pq.write_table(table, snapshot / "plain_text" / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    source = open_source("uoft-cs/cifar10", "train")
    assert (source.class_names, source.labels.tolist()) == (tuple(NAMES), LABELS)
    assert np.array_equal(np.asarray(source.image(3)), PIXELS[3])
    assert source.fingerprint == open_source(str(snapshot), "train").fingerprint
    with pytest.raises(UserError, match="data source 'nobody/nothing' is neither a file or folder nor to be had from the hub"):
        open_source("nobody/nothing", "train")


def test_folders_are_searched_to_any_depth_for_images_only(tmp_path: Path):
    write_folder(tmp_path)
    deep = tmp_path / "train" / "dog" / "more" / "x.PNG"
    deep.parent.mkdir()
    deep.write_bytes(encode_png(Image.fromarray(PIXELS[0])))
    (tmp_path / "train" / "dog" / "notes.txt").write_text("not an image")
    source = open_source(str(tmp_path), "train")
    assert source.labels.tolist() == [0, 0, 1, 1, 1, 2]
    assert str(Path("dog", "more", "x.PNG")) in {source.identify(i) for i in range(6)}


def test_a_missing_path_is_refused(tmp_path: Path):
    assert "does not exist" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "split"), [("nothing", "train"), ("fashion-mnist", "validation")])
def test_a_missing_embedded_set_is_refused_with_those_there_are(name: str, split: str):
    assert "fashion-mnist" in refused(f"embedded:{name}", split).split("there is:")[1]


@pytest.mark.parametrize("kind", WRITERS)
def test_a_missing_split_is_refused(tmp_path: Path, kind: str):
    assert "'test'" in refused(WRITERS[kind](tmp_path / "set"), "test")


def test_an_empty_folder_is_refused(tmp_path: Path):
    assert "holds neither" in refused(tmp_path)


def test_class_folders_without_images_are_refused(tmp_path: Path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    assert "holds no image" in refused(tmp_path)


def test_empty_idx_files_are_refused(tmp_path: Path):
    assert "holds no image" in refused(write_idx(tmp_path, PIXELS[:0], []))


def test_an_empty_parquet_file_is_refused(tmp_path: Path):
    pq.write_table(image_table(rows(), NAMES).slice(0, 0), tmp_path / "train.parquet")
    assert "holds no image" in refused(tmp_path)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def garbled(content: bytes) -> bytes:
    return content[:12] + bytes(255 - b for b in content[12:-8]) + content[-8:]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("damage", [cut, lambda content: content[:3], lambda content: b"", lambda content: b"<html>404</html>"])
def test_damaged_idx_files_are_refused(tmp_path: Path, zipped: bool, damage: Callable[[bytes], bytes]):
    write_idx(tmp_path, PIXELS, LABELS, zipped)
    images = next(tmp_path.glob("train-images*"))
    images.write_bytes(damage(images.read_bytes()))
    assert "cannot be read" in refused(tmp_path)


def test_a_garbled_gzip_stream_is_refused(tmp_path: Path):
    write_idx(tmp_path, PIXELS, LABELS, zipped=True)
    images = next(tmp_path.glob("train-images*"))
    images.write_bytes(garbled(images.read_bytes()))
    assert "cannot be read" in refused(tmp_path)


def test_idx_files_of_another_number_type_are_refused(tmp_path: Path):
    write_idx(tmp_path, PIXELS, LABELS)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx_bytes(PIXELS, kind=13))
    assert "0xd" in refused(tmp_path)


def test_idx_files_of_other_dimensions_are_refused(tmp_path: Path):
    assert "train-labels-idx1-ubyte' in" in refused(write_idx(tmp_path, PIXELS, [[label] for label in LABELS]))
    assert "has 2 dimensions instead of 3" in refused(write_idx(tmp_path, PIXELS[:, 0], LABELS))


def test_idx_images_and_labels_must_be_equally_many(tmp_path: Path):
    assert "5 images but 4 labels" in refused(write_idx(tmp_path, PIXELS, LABELS[:4]))


def test_idx_labels_beyond_the_named_classes_are_refused(tmp_path: Path):
    (write_idx(tmp_path, PIXELS, LABELS) / "classes.txt").write_text("cat\ndog\n")
    refused(tmp_path)


@pytest.mark.parametrize("damage", [cut, lambda content: b"", lambda content: b"<html>404</html>"])
def test_damaged_parquet_files_are_refused(tmp_path: Path, damage: Callable[[bytes], bytes]):
    file = write_parquet(tmp_path) / "train.parquet"
    file.write_bytes(damage(file.read_bytes()))
    assert "cannot be read" in refused(tmp_path)


@pytest.mark.parametrize(
    "columns",
    [
        {"image": [b"x"]},
        {"label": [0]},
        {"text": ["x"], "label": [0]},
        {"image": [b"x"], "label": [0]},
        {"image": [{"path": "x.png"}], "label": [0]},
        {"image": [{"bytes": b"x", "path": "x"}], "label": ["cat"]},
        {"image": [{"bytes": b"x", "path": "x"}] * 2, "label": [0, None]},
    ],
    ids=["no label", "no image", "other columns", "plain bytes", "no bytes", "label is text", "label is null"],
)
def test_parquet_of_another_layout_is_refused(tmp_path: Path, columns: dict[str, list[object]]):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    refused(tmp_path)


@pytest.mark.parametrize("label", [-1, 3])
def test_parquet_labels_beyond_the_named_classes_are_refused(tmp_path: Path, label: int):
    content = parquet_bytes(image_table(rows([*LABELS[:4], label]), NAMES))
    (tmp_path / "train.parquet").write_bytes(content)
    refused(tmp_path)


def photograph() -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("damage", [cut, lambda content: content[:20], lambda content: b"", lambda content: b"no image"])
def test_an_image_that_does_not_decode_is_an_os_error_that_load_pixels_names(
    tmp_path: Path, form: str, damage: Callable[[bytes], bytes]
):
    for name in ("a.img", "b.img", "c.img"):
        file = tmp_path / "cat" / name.replace("img", form.lower())
        file.parent.mkdir(exist_ok=True)
        photograph().save(file, format=form)
    broken = tmp_path / "cat" / f"b.{form.lower()}"
    broken.write_bytes(damage(broken.read_bytes()))
    source = open_source(str(tmp_path), "train")
    with pytest.raises(OSError, match=r".+"):
        source.image(1)
    pixels, labels, names = load_pixels(source, 16, 3)
    assert names == [source.identify(1)] == [str(Path("cat", f"b.{form.lower()}"))]
    assert pixels.shape == (2, 3, 16, 16)
    assert labels.tolist() == [0, 0]


def test_a_parquet_row_without_bytes_is_named(tmp_path: Path):
    images = [{"bytes": encode_png(photograph()), "path": "a"}, {"bytes": None, "path": "b"}]
    pq.write_table(pa.table({"image": images, "label": [1, 0]}), tmp_path / "train.parquet")
    pixels, labels, names = load_pixels(open_source(str(tmp_path), "train"), 8, 3)
    assert names == ["train.parquet row 1"]
    assert (len(pixels), labels.tolist()) == (1, [1])
    packing = {"data": {"path": str(tmp_path / "train.parquet")}, "out": str(tmp_path / "packed.parquet")}
    with pytest.raises(UserError, match=r"row 1' cannot be decoded \(its row holds no bytes of an image; a path alone is not"):
        pack(PackConfig.model_validate(packing))


def test_load_pixels_of_nothing_readable_is_empty(tmp_path: Path):
    pq.write_table(pa.table({"image": [{"bytes": b"x", "path": "a"}], "label": [0]}), tmp_path / "train.parquet")
    pixels, labels, names = load_pixels(open_source(str(tmp_path), "train"), 8, 3)
    assert (tuple(pixels.shape), len(labels), len(names)) == ((0, 3, 8, 8), 0, 1)


def test_load_pixels_keeps_pixels_that_already_fit(tmp_path: Path):
    squares = PIXELS[:, :4]
    pixels, labels, broken = load_pixels(open_source(str(write_idx(tmp_path, squares, LABELS)), "train"), 4, 1)
    assert np.array_equal(pixels[:, 0].numpy(), squares)
    assert labels.tolist() == LABELS
    assert broken == []


def print_of(folder: Path) -> str:
    return open_source(str(folder), "train").fingerprint


@pytest.mark.parametrize("kind", WRITERS)
def test_equal_content_has_an_equal_fingerprint_wherever_it_lies(tmp_path: Path, kind: str):
    first, second = (WRITERS[kind](tmp_path / name) for name in ("one", "two"))
    assert print_of(first) == print_of(second)


def move_an_image_to_the_next_class(folder: Path) -> None:
    """The files keep their names, bytes and order."""
    (folder / "train" / "cat" / "04.png").rename(folder / "train" / "dog" / "04.png")


def rename_a_class(folder: Path) -> None:
    (folder / "train" / "eel").rename(folder / "train" / "fox")


def change_one_pixel(folder: Path) -> None:
    changed = PIXELS[0].copy()
    changed[0, 0] ^= 1
    (folder / "train" / "dog" / "10.png").write_bytes(encode_png(Image.fromarray(changed)))


def remove_an_image(folder: Path) -> None:
    (folder / "train" / "dog" / "10.png").unlink()


@pytest.mark.parametrize("change", [change_one_pixel, remove_an_image, move_an_image_to_the_next_class, rename_a_class])
def test_the_fingerprint_of_a_folder_changes_with(tmp_path: Path, change: Callable[[Path], None]):
    before = print_of(write_folder(tmp_path))
    change(tmp_path)
    assert print_of(tmp_path) != before


def test_the_fingerprint_of_a_large_set_changes_when_it_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "HASH_WHOLE_BELOW", 0)
    monkeypatch.setattr(base, "PIECE_BYTES", 7)
    folder, tensors = tmp_path / "folder", tmp_path / "tensors"
    write_folder(folder)
    write_tensors(tensors, torch.rand(5, 1, 4, 4), torch.tensor(LABELS))
    before = print_of(folder), print_of(tensors)
    assert (print_of(folder), print_of(tensors)) == before
    size = (tensors / "images.pt").stat().st_size
    write_tensors(tensors, torch.rand(5, 1, 4, 4), torch.tensor(LABELS))
    assert (tensors / "images.pt").stat().st_size == size
    assert print_of(tensors) != before[1]
    for file in (folder / "train").rglob("*.png"):
        file.write_bytes(bytes(len(file.read_bytes())))
    assert print_of(folder) != before[0]


def test_the_fingerprint_of_idx_files_changes_with_pixels_labels_and_names(tmp_path: Path):
    other = PIXELS.copy()
    other[2, 3, 1] ^= 1
    names = write_idx(tmp_path / "names", PIXELS, LABELS)
    (names / "classes.txt").write_text("\n".join(NAMES))
    folders = [
        write_idx(tmp_path / "same", PIXELS, LABELS),
        write_idx(tmp_path / "pixels", other, LABELS),
        write_idx(tmp_path / "labels", PIXELS, [1, 0, 2, 0, 1]),
        names,
    ]
    assert len({print_of(folder) for folder in folders}) == 4


def test_the_fingerprint_of_parquet_changes_with_its_labels(tmp_path: Path):
    before = print_of(write_parquet(tmp_path))
    (tmp_path / "train.parquet").write_bytes(parquet_bytes(image_table(rows([1, 0, 2, 0, 1]), NAMES)))
    assert print_of(tmp_path) != before


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA", "CMYK"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(16, 16), (40, 17), (15, 90), (300, 200), (1, 5), (3, 16)])
def test_pixels_have_the_shape_asked_for(mode: str, channels: int, shape: tuple[int, int]):
    pixels = to_pixels(Image.new("RGB", shape, (90, 90, 90)).convert(mode), 16, channels)
    assert pixels.shape == (channels, 16, 16)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize("shape", [(16, 16), (40, 17), (15, 90), (300, 200), (1, 5)])
def test_an_even_image_stays_even(shape: tuple[int, int]):
    pixels = to_pixels(Image.new("RGB", shape, (10, 120, 240)), 16, 3)
    assert all((pixels[channel] == value).all() for channel, value in enumerate((10, 120, 240)))


def test_the_centre_of_an_image_that_is_wide_or_high_is_cut_out():
    image = np.random.default_rng(2).integers(0, 256, (8, 14, 3), dtype=np.uint8)
    assert np.array_equal(to_pixels(Image.fromarray(image), 8, 3), image[:, 3:11].transpose(2, 0, 1))
    high = image.transpose(1, 0, 2).copy()
    assert np.array_equal(to_pixels(Image.fromarray(high), 8, 3), high[3:11].transpose(2, 0, 1))


def test_an_image_of_twice_the_size_is_averaged_two_by_two():
    image = np.random.default_rng(3).integers(0, 256, (16, 16), dtype=np.uint8)
    mean = image.reshape(8, 2, 8, 2).astype(np.float64).mean((1, 3))
    assert np.abs(to_pixels(Image.fromarray(image), 8, 1)[0] - mean).max() <= 1.0  # Pillow rounds after each axis


def test_a_grey_image_has_three_equal_channels_in_colour():
    pixels = to_pixels(Image.fromarray(PIXELS[0]), 4, 3)
    assert np.array_equal(pixels[0], pixels[1])
    assert np.array_equal(pixels[0], pixels[2])


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_survive_the_way_through_pillow(channels: int):
    pixels = torch.randint(256, (channels, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(to_pixels(to_pil(pixels), 8, channels), pixels.numpy())


def test_every_pixel_value_survives_the_signed_range():
    values = torch.arange(256, dtype=torch.uint8)
    signed = to_signed(values)
    assert (signed.min(), signed.max()) == (-1, 1)
    assert torch.equal(to_uint8(signed), values)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.999])).tolist() == [0, 255, 255]


def take(count: int, batch: int, rank: int, world: int, steps: int, seed: int = 0, first: int = 0) -> list[list[int]]:
    return [b.tolist() for b in itertools.islice(batch_indices(count, batch, rank, world, seed, first), steps)]


@pytest.mark.parametrize(("count", "batch"), [(12, 4), (10, 4), (3, 8), (7, 1)])
def test_every_epoch_is_a_fresh_permutation(count: int, batch: int):
    flat = list(itertools.chain(*take(count, batch, 0, 1, 4 * count)))
    epochs = [flat[i : i + count] for i in range(0, 4 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("world", [2, 4])
def test_the_ranks_share_each_batch_of_one_worker(world: int):
    alone = take(23, 8, 0, 1, 9)
    ranks = [take(23, 8, rank, world, 9) for rank in range(world)]
    for step, batch in enumerate(alone):
        assert list(itertools.chain(*(parts[step] for parts in ranks))) == batch
        assert all(len(parts[step]) == 8 // world for parts in ranks)


@pytest.mark.parametrize("first", [1, 5, 13])
def test_a_restart_continues_with_the_very_batches(first: int):
    assert take(10, 4, 1, 2, 4, first=first) == take(10, 4, 1, 2, 4 + first)[first:]


def test_batches_follow_their_seed():
    assert take(50, 10, 0, 1, 3, seed=1) == take(50, 10, 0, 1, 3, seed=1) != take(50, 10, 0, 1, 3, seed=2)


def test_batches_take_any_seed_of_the_seed_function():
    assert len(take(5, 5, 0, 1, 1, seed=seed_for(0, "batches"))[0]) == 5


def test_a_batch_that_the_workers_cannot_share_equally_loses_no_image():
    parts = [take(8, 8, rank, 3, 1)[0] for rank in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(8))


@pytest.mark.parametrize("shape", [(300, 200), (200, 301), (33, 57), (20, 20), (16, 16)])
def test_bilinear_scaling_is_torchvisions_resize_and_centre_crop(shape: tuple[int, int]):
    from torchvision.transforms import CenterCrop, Compose, Resize

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = np.asarray(Compose([Resize(16), CenterCrop(16)])(image)).transpose(2, 0, 1)
    assert np.array_equal(to_pixels(image, 16, 3, "bilinear"), expected)


def test_the_test_split_may_have_a_limit_of_its_own():
    assert DataConfig(limit=3).place("test") == ("embedded:fashion-mnist", "test", 3, None)
    assert DataConfig(limit=3, test_limit=2).place("test")[2] == 2
    assert DataConfig(limit=3, test_limit=2).place("train")[2] == 3
    assert DataConfig(test_limit=2).place("train")[2] is None


def write_tensors(folder: Path, images: torch.Tensor, labels: object, names: str | None = "bird\ncat\ndog\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(images, folder / "images.pt")
    torch.save(labels, folder / "labels.pt")
    if names is not None:
        (folder / "classes.txt").write_text(names)
    return folder


def test_tensors_as_other_projects_save_sets_are_read(tmp_path: Path):
    pixels = torch.from_numpy(np.stack([PIXELS, 255 - PIXELS, PIXELS // 2], axis=1))
    shares, hard = pixels / 255, torch.tensor(LABELS)
    expected = [np.asarray(to_pil(image)) for image in pixels]

    def same(path: Path) -> bool:
        source = open_source(str(path), "train")
        return all(np.array_equal(np.asarray(source.image(i)), expected[i]) for i in range(len(expected)))

    plain = write_tensors(tmp_path / "plain", shares, hard)
    source = open_source(str(plain), "train")
    assert (source.class_names, source.labels.tolist(), source.extras([0])) == (("bird", "cat", "dog"), LABELS, {})
    assert source.identify(2) == "images.pt[2]"
    assert same(plain)
    assert same(write_tensors(tmp_path / "bytes", pixels, hard))
    assert open_source(str(write_tensors(tmp_path / "numbered", pixels, hard, None)), "train").class_names == ("0", "1", "2")

    normalised = write_tensors(tmp_path / "normalised", (shares - 0.4) / 0.2, hard)
    assert "it is normalised, write the mean" in refused(normalised)
    (normalised / "normalisation.json").write_text(json.dumps({"mean": [0.4] * 3, "std": [0.2] * 3}))
    assert same(normalised)
    (normalised / "normalisation.json").write_text('{"mean": [0.4], "std": [0.2]}')
    assert "with a number for each channel" in refused(normalised)
    (normalised / "normalisation.json").write_text('{"mean": "grey"}')
    assert "with a number for each channel" in refused(normalised)

    logits = torch.nn.functional.one_hot(hard, 3) * 4.0 - 1
    soft = open_source(str(write_tensors(tmp_path / "soft", shares, logits)), "train")
    assert soft.labels.tolist() == LABELS
    assert np.array_equal(soft.extras([1, 0])["logits"], logits[[1, 0]].numpy())


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path):
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 2])
    assert "for 2 images" in refused(write_tensors(tmp_path / "a", images, labels[:1]))
    assert "for 2 images" in refused(write_tensors(tmp_path / "a", images, labels[:, None]))
    assert "holds no image" in refused(write_tensors(tmp_path / "a", images[:0], labels[:0]))
    assert "save integers" in refused(write_tensors(tmp_path / "a", images, labels + 0.7))
    assert "holds probabilities" in refused(write_tensors(tmp_path / "a", images, torch.tensor([[0.9, 0.1], [0.2, 0.8]])))
    assert "no finite" in refused(write_tensors(tmp_path / "a", images, torch.full((2, 3), torch.nan)))
    assert "is not [N, 1 or 3, H, W]" in refused(write_tensors(tmp_path / "b", images[:, 0], labels))
    assert "holds a dict" in refused(write_tensors(tmp_path / "c", images, {"labels": labels}))
    assert "images labelled 2" in refused(write_tensors(tmp_path / "d", images, labels, "bird\ncat\n"))
    assert "values from nan" in refused(write_tensors(tmp_path / "e", images.fill_(float("nan")), labels))
    (tmp_path / "d" / "images.pt").write_bytes(b"no tensor")
    assert "is not a readable PyTorch file" in refused(tmp_path / "d")


def test_packing_overwrites_nothing_and_names_a_folder_that_is_missing(tmp_path: Path):
    write_folder(tmp_path)
    config = PackConfig.model_validate({"data": {"path": str(tmp_path)}, "out": str(tmp_path / "train.parquet")})
    pack(config)
    with pytest.raises(UserError, match="exists; choose another out="):
        pack(config)
    with pytest.raises(UserError, match=r"is no name of a Parquet file; end it in \.parquet"):
        pack(config.model_copy(update={"out": str(tmp_path / "packed.txt")}))
    with pytest.raises(UserError, match=r"'data.size=9' has no effect here, since nothing uses it"):
        load_config(PackConfig, None, ["data.size=9"])
    with pytest.raises(UserError, match="does not exist; make it"):
        pack(config.model_copy(update={"out": str(tmp_path / "nowhere" / "train.parquet")}))
    assert len(open_source(str(tmp_path / "train.parquet"), "train").labels) == 5


def test_packing_reads_splits_and_classes_as_a_run_does(tmp_path: Path):
    for name, count, first in (("cat", 20, 0), ("dog", 10, 100), ("eel", 10, 200)):
        for number in range(first, first + count):
            file = tmp_path / "photos" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(Image.fromarray(np.full((4, 4), number, np.uint8))))

    def packed(**values: object) -> Source:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.parquet"
        data = {"path": str(tmp_path / "photos"), **values.pop("data", {})}  # type: ignore[dict-item]
        pack(PackConfig.model_validate({"data": data, "out": str(out), **values}))
        return open_source(str(out), "train")

    with pytest.raises(UserError, match=r"the test split of .* holds the training images .*data.test_share"):
        packed(split="test")
    apart = {"test_share": 0.2, "classes": ["eel", "cat"]}
    train, test = packed(data=apart), packed(data=apart, split="test")
    assert train.class_names == test.class_names == ("eel", "cat")
    assert [np.bincount(source.labels).tolist() for source in (train, test)] == [[8, 16], [2, 4]]
    shown = [{np.asarray(source.image(i)).tobytes() for i in range(len(source.labels))} for source in (train, test)]
    assert shown[0].isdisjoint(shown[1])


def with_columns(folder: Path, **columns: pa.Array) -> Path:
    table = image_table(rows(), NAMES)
    for name, column in columns.items():
        table = table.append_column(name, column)
    folder.mkdir(exist_ok=True)
    pq.write_table(table, folder / "train.parquet")
    return folder


def test_soft_labels_and_weights_of_parquet_are_checked(tmp_path: Path):
    logits = [[float(i), -1.0, 0.5] for i in range(5)]
    whole = open_source(str(with_columns(tmp_path / "a", logits=pa.array(logits), weight=pa.array([1.0] * 5))), "train")
    assert whole.extras([2])["logits"].tolist() == [[2.0, -1.0, 0.5]]
    assert whole.extras([2])["weights"].tolist() == [1.0]
    for wrong, says in (
        ({"logits": pa.array([[0.2, 0.3, 0.5]] * 5)}, "holds probabilities, which would be taken for logits"),
        ({"logits": pa.array([[float("nan"), 0.0, 1.0]] * 5)}, "no finite floating-point numbers"),
        ({"logits": pa.array([*logits[:4], [1.0]])}, "rows that are missing or differ in length"),
        ({"weight": pa.array([1.0, 1.0, None, 1.0, 1.0])}, "weights that are not above 0"),
        ({"weight": pa.array([1, 1, -1, 1, 1])}, "weights that are not above 0"),
    ):
        source = open_source(str(with_columns(tmp_path / "b", **wrong)), "train")  # real data may have such columns
        with pytest.raises(UserError, match=says):
            source.extras([0])
    others = with_columns(tmp_path / "c", weight=pa.array(["6.9 kg"] * 5), logits=pa.array([1.0] * 5))
    assert open_source(str(others), "train").extras([0]) == {}, "columns of the data that mean something else"


def test_an_image_whose_sides_differ_too_much_is_no_image(tmp_path: Path):
    with pytest.raises(Undecodable, match="65000 and 1 pixels, differ too much"):
        to_pixels(Image.new("L", (65_000, 1)), 64, 1)
    assert to_pixels(Image.new("L", (300, 1)), 8, 1).shape == (1, 8, 8)


@pytest.mark.parametrize("wrong", [b"train/caf\xe9/0.png", b"train/cat/caf\xe9.png"])
def test_a_name_that_is_not_utf_8_is_one_line(wrong: bytes, tmp_path: Path):
    write_folder(tmp_path)
    file = os.fsencode(tmp_path) + b"/" + wrong
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as out:
        out.write(encode_png(Image.new("L", (4, 4))))
    assert r"caf\xe9" in refused(tmp_path)


def test_other_processes_find_a_source_at_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_parquet(tmp_path)
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(open_source("train.parquet", "train"))
    monkeypatch.chdir("/")
    assert pickle.loads(sent).class_names == tuple(NAMES)


def names_of(source: Source) -> set[str]:
    return {source.identify(index) for index in range(len(source.labels))}


def test_a_share_of_each_class_is_set_apart_by_the_hashes_of_its_names(tmp_path: Path):
    def opened(share: float, limit: int | None = None) -> list[Source]:
        return [open_source(str(tmp_path), "train", limit, (share, tested)) for tested in (False, True)]

    for name, count in (("cat", 20), ("dog", 7)):
        for number in range(count):
            file = tmp_path / "photos" / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(Image.fromarray(np.full((4, 4), 10 * number, np.uint8))))
    (tmp_path / "photos").rename(tmp_path / "train")
    train, test = opened(0.2)
    assert names_of(train).isdisjoint(names_of(test))
    assert names_of(train) | names_of(test) == names_of(open_source(str(tmp_path), "train"))
    assert [np.bincount(source.labels).tolist() for source in (train, test)] == [[16, 6], [4, 1]]
    assert train.fingerprint != test.fingerprint
    sent = pickle.loads(pickle.dumps(test))
    assert names_of(sent) == names_of(test)
    assert np.array_equal(np.asarray(sent.image(2)), np.asarray(test.image(2)))
    few, few_tested = opened(0.2, limit=3)
    assert names_of(few) < names_of(train)
    assert [np.bincount(source.labels).tolist() for source in (few, few_tested)] == [[3, 3], [3, 1]]
    assert "5 of 27 images" in few_tested.notices[0]
    before = names_of(test)
    for number in range(20, 25):
        (tmp_path / "train" / "cat" / f"{number}.png").write_bytes(encode_png(Image.fromarray(np.zeros((4, 4), np.uint8))))
    assert len(names_of(opened(0.2)[1]) & before) >= len(before) - 1, "new images move few of the old ones"
    assert [len(source.labels) for source in opened(0.999)] == [2, 30], "each part has an image of each class"
    (tmp_path / "train" / "eel").mkdir()
    (tmp_path / "train" / "eel" / "0.png").write_bytes(encode_png(Image.fromarray(np.zeros((4, 4), np.uint8))))
    with pytest.raises(UserError, match=r"class 'eel' .* has one image, of which none can be set apart"):
        opened(0.2)


def test_packing_a_set_keeps_its_soft_labels_and_weights(tmp_path: Path):
    pictures = [(encode_png(Image.fromarray(np.full((4, 4), i, np.uint8))), str(i), i % 3) for i in range(6)]
    extras = {"logits": np.arange(18, dtype=np.float32).reshape(6, 3), "weights": np.arange(1, 7, dtype=np.float32)}
    (tmp_path / "set.parquet").write_bytes(parquet_bytes(image_table(pictures, ["a", "b", "c"], extras)))

    def packed(out: str, **more: object) -> Source:
        data = {"path": str(tmp_path / "set.parquet"), **more.pop("data", {})}  # type: ignore[dict-item]
        pack(PackConfig.model_validate({"data": data, "out": str(tmp_path / out), **more}))
        return open_source(str(tmp_path / out), "train")

    whole, part = packed("whole.parquet"), packed("part.parquet", per_class=1)
    assert whole.extras(range(6))["logits"].tolist() == extras["logits"].tolist()
    chosen = [int(np.asarray(part.image(i))[0, 0]) for i in range(3)]
    assert part.extras(range(3))["weights"].tolist() == [number + 1 for number in chosen]
    with pytest.raises(UserError, match="has soft labels of all its classes; pack all of them"):
        packed("some.parquet", data={"classes": ["c", "a"]})


def test_packing_reads_the_split_that_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for split, count in (("train", 1), ("val", 2), ("test", 3)):
        for name, number in itertools.product(("cat", "dog"), range(count)):
            file = tmp_path / "photos" / split / name / f"{number}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode_png(Image.fromarray(np.full((4, 4), 10 * count + number + ord(name[0]), np.uint8))))

    def count(split: str, **data: str) -> int:
        out = tmp_path / f"{split}{len(data)}{len(list(tmp_path.iterdir()))}.parquet"
        config = {"data": {"path": str(tmp_path / "photos"), **data}, "split": split, "out": str(out)}
        pack(PackConfig.model_validate(config))
        return len(open_source(str(out), "train").labels)

    assert [count(split, test_split="val") for split in ("train", "val", "test")] == [2, 4, 6]
    shutil.rmtree(tmp_path / "photos" / "train")
    assert count("test") == 6
    assert "was not checked: data source" in capsys.readouterr().out
    (tmp_path / "photos" / "val").rename(tmp_path / "photos" / "Training")
    (tmp_path / "photos" / "test").rename(tmp_path / "photos" / "Testing")
    names = {"train_split": "Training", "test_split": "Testing"}
    assert [count("train", **names), count("test", **names), count("Testing", **names)] == [4, 6, 6]
    assert count("train", train_split="Training", test_path=str(tmp_path / "photos" / "Testing")) == 4
    for data in ({}, {"test_share": "0.2"}):
        with pytest.raises(UserError, match="holds 'Testing' and 'Training', which would be read as classes; name the folders"):
            count("train", **data)
