"""Images and folders as people have them: every mode and bit depth gives known pixels, hidden files are no images, and the
layouts in which data sets are downloaded are read, or refused by one line."""

from __future__ import annotations

import io
import itertools
import unicodedata
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ims3_ray.config import DataConfig, EvaluateConfig, RunConfig, WorkConfig
from ims3_ray.config.loading import load_config
from ims3_ray.data.batches import load_pixels
from ims3_ray.data.decoding import decode
from ims3_ray.data.prompts import prompts_of
from ims3_ray.data.sources import Source, open_source
from ims3_ray.data.transforms import is_transparent, opaque, to_pixels
from ims3_ray.engine.inputs import Data
from ims3_ray.engine.planner import Planner
from ims3_ray.errors import UserError
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes
from ims3_ray.plan import make_evaluation
from ims3_ray.stages.encode import Encode, RealImages

GREY = Image.new("L", (4, 4), 100)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(image: Image.Image, form: str, **options: Any) -> list[Any]:
    """The decoded pixels of an image that is stored and read again."""
    found = decode(encoded(image, form, **options))
    return np.asarray(opaque(found, 1 if found.mode == "L" else 3)).tolist()


def palette(transparent: bool) -> Image.Image:
    """Two pixels: colour 1, then colour 0."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((0, 0), 1)
    return image


# Modes and bit depths


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_divided_by_257(form: str):
    deep = Image.fromarray(np.array([[0, 257 * 10, 65_535, 32_896]], np.uint16))
    assert pixels(deep, form) == [[0, 10, 255, 128]]


def test_floating_point_grey_is_read_from_0_to_1():
    assert pixels(Image.fromarray(np.array([[0, 0.2, 1]], np.float32)), "TIFF") == [[0, 51, 255]]


@pytest.mark.parametrize(
    "values",
    [np.array([[0, 200.0]], np.float32), np.array([[0, np.nan]], np.float32), np.array([[-0.1, 1]], np.float32),
     np.array([[0, 70_000]], np.int32), np.array([[0, 200]], np.int32)],
    ids=["0 to 200", "not a number", "negative", "32 bits", "32 bits, small"],
)  # fmt: skip
def test_values_without_a_known_white_are_refused(values: np.ndarray):
    with pytest.raises(OSError, match=r"values reach from|has no known conversion"):
        decode(encoded(Image.fromarray(values), "TIFF"))


def test_one_bit_is_black_and_white():
    image = Image.new("1", (2, 1))
    image.putpixel((0, 0), 1)
    assert pixels(image, "PNG") == [[255, 0]]


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_is_ink_on_white_paper(form: str):
    assert pixels(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), form)[0][0] == [255, 255, 255]
    assert pixels(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), form)[0][0] == [0, 0, 0]
    red, green, blue = pixels(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), form)[0][0]
    assert (red < 5, green > 250, blue > 250) == (True, True, True)


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_palette_gives_its_colours(form: str):
    assert pixels(palette(False), form) == [[[200, 100, 50], [10, 20, 30]]]


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_what_is_transparent_is_white(form: str):
    assert pixels(palette(True), form, transparency=0) == [[[200, 100, 50], [255, 255, 255]]]


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        (Image.new("RGBA", (1, 1), (0, 0, 0, 0)), [255, 255, 255]),
        (Image.new("RGBA", (1, 1), (10, 20, 30, 255)), [10, 20, 30]),
        (Image.new("RGBA", (1, 1), (0, 0, 0, 51)), [204, 204, 204]),
        (Image.new("LA", (1, 1), (0, 0)), [255, 255, 255]),
    ],
)
def test_alpha_is_laid_on_white(image: Image.Image, wanted: list[int]):
    assert pixels(image, "PNG") == [[wanted]]


def test_the_background_is_that_of_the_config():
    hidden = decode(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 0)), "PNG"))
    assert is_transparent(hidden)
    assert not is_transparent(decode(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 255)), "PNG")))
    for name, colour in (("white", [255, 255, 255]), ("black", [0, 0, 0]), ("#0a141e", [10, 20, 30])):
        found = to_pixels(hidden, 4, 3, background=DataConfig(background=name).colour)
        assert found[:, 0, 0].tolist() == colour
    assert to_pixels(hidden, 4, 1, background=DataConfig(background="black").colour).max() == 0
    with pytest.raises(UserError, match=r"data\.background='whiet'"):
        load_config(RunConfig, None, ["data.background=whiet"])
    assert DataConfig().background_params == DataConfig(background="#ffffff").background_params == {}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_the_camera_was_held(form: str):
    """EXIF orientation 6: the first row of the stored pixels is the right side of the picture."""
    stored = Image.new("L", (16, 8), 0)
    stored.paste(255, (0, 0, 16, 4))
    exif = Image.Exif()
    exif[0x0112] = 6
    shown = np.asarray(decode(encoded(stored.convert("RGB"), form, exif=exif)).convert("L"))
    assert shown.shape == (16, 8)
    assert shown[:, :3].max() < 10
    assert shown[:, 5:].min() > 245


@pytest.mark.filterwarnings("ignore:Truncated File Read", "ignore:Corrupt EXIF data", "ignore:Possibly corrupt EXIF")
@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_damaged_exif_data_do_not_cost_the_image(form: str):
    """Pillow raises errors of many kinds for them, such as struct.error."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x829A] = 3, "a description", 0.5
    whole = encoded(GREY.convert("RGB"), form, exif=exif)
    start, end = whole.index(b"MM\x00*"), whole.index(b"a description") + 13
    rng = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(whole)
        for place in rng.integers(start, end, 4):
            broken[place] = rng.integers(256)
        assert decode(bytes(broken)).size == (4, 4)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("L", (2, 2), value) for value in (50, 200)]
    assert pixels(frames[0], "GIF", save_all=True, append_images=frames[1:])[0][0] in (50, [50, 50, 50])


def test_colours_and_grey_go_into_either_number_of_channels():
    assert to_pixels(decode(encode_png(GREY)), 4, 3).tolist() == [[[100] * 4] * 4] * 3
    assert to_pixels(decode(encode_png(GREY.convert("RGB"))), 4, 1).tolist() == [[[100] * 4] * 4]


# Names of files and folders


def write(path: Path, image: Image.Image = GREY, form: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(image, form))


def files_of(source: Source) -> set[tuple[str, str]]:
    """(class, name of the file) of each image."""
    return {(source.class_names[label], source.identify(i).split("/")[-1]) for i, label in enumerate(source.labels)}


def test_hidden_files_and_folders_are_no_images_and_no_classes(tmp_path: Path):
    for name in ("a/0.png", "a/._0.png", "a/.ipynb_checkpoints/0-checkpoint.png", "b/1.png"):
        write(tmp_path / "train" / name)
    for folder in (".git", ".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        write(tmp_path / "train" / folder / "x.png")
    (tmp_path / "train" / ".DS_Store").write_bytes(b"x")
    source = open_source(str(tmp_path), "train")
    assert source.class_names == ("a", "b")
    assert files_of(source) == {("a", "0.png"), ("b", "1.png")}
    assert list(source.notices) == []


@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        (".jfif", "JPEG"),
        (".jpe", "JPEG"),
        (".JPEG", "JPEG"),
        (".tif", "TIFF"),
        (".ppm", "PPM"),
        (".pgm", "PPM"),
        (".bmp", "BMP"),
    ],
)
def test_images_are_found_by_all_their_usual_endings(suffix: str, form: str, tmp_path: Path):
    write(tmp_path / "a" / f"0{suffix}", GREY, form)
    source = open_source(str(tmp_path), "train")
    assert np.asarray(source.image(0)).shape[:2] == (4, 4)


def test_files_that_are_not_read_are_counted_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for split in ("train", "test"):
        for label in ("a", "b"):
            write(tmp_path / split / label / f"{split}{label}.png", Image.new("L", (4, 4), len(split) + ord(label)))
    (tmp_path / "train" / "a" / "1.heic").write_bytes(b"x")
    (tmp_path / "train" / "b" / "2.heic").write_bytes(b"x")
    (tmp_path / "train" / "b" / "notes.txt").write_bytes(b"x")
    Data(load_config(RunConfig, None, [f"data.path={tmp_path}"]))
    assert f"note: '{tmp_path}/train' holds 3 files that are not read as images (2 .heic, 1 .txt)" in capsys.readouterr().out


def test_numbered_classes_stand_in_the_order_of_their_numbers(tmp_path: Path):
    for label in range(12):
        write(tmp_path / "train" / str(label) / f"{label}.png")
    assert open_source(str(tmp_path), "train").class_names == tuple(map(str, range(12)))


# Splits and classes


def test_a_class_may_be_called_train(tmp_path: Path):
    """CIFAR-100 has a class of trains."""
    for split in ("train", "test"):
        for label in ("apple", "train"):
            write(tmp_path / split / label / "0.png")
    assert open_source(str(tmp_path), "train").class_names == ("apple", "train")
    assert open_source(str(tmp_path), "test").class_names == ("apple", "train")
    assert files_of(open_source(str(tmp_path / "train"), "train")) == {("apple", "0.png"), ("train", "0.png")}


def data_of(path: Path, *overrides: str) -> Data:
    return Data(load_config(RunConfig, None, [f"data.path={path}", *overrides]))


def test_a_folder_without_splits_is_no_data_to_test_on(tmp_path: Path):
    for label in ("a", "b"):
        write(tmp_path / label / "0.png")
    with pytest.raises(UserError, match=r"holds the training images .*train/ and test/ side by side.*data\.test_path"):
        data_of(tmp_path)


def test_an_image_beside_the_classes_makes_no_class_of_a_split(tmp_path: Path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            write(tmp_path / split / label / f"{split}.png")
    write(tmp_path / "train" / "overview.png")
    source = open_source(str(tmp_path), "train")
    assert source.class_names == ("cat", "dog")
    assert len(source.labels) == 2
    assert list(source.notices) == [
        f"'{tmp_path}/train' holds 1 images beside its classes ('overview.png'), which are not read"
    ]


def test_folders_without_images_are_named_and_are_no_classes(tmp_path: Path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            write(tmp_path / split / label / f"{split}.png")
    for name in ("empty", "notes"):
        (tmp_path / "train" / name).mkdir()
    (tmp_path / "train" / "notes" / "readme.txt").write_text("none")
    source = open_source(str(tmp_path), "train")
    assert source.class_names == ("cat", "dog")
    assert source.notices == [f"'{tmp_path}/train' holds 2 folders without images (empty, notes), which are not read"]


def test_a_single_file_is_no_test_split_of_itself(tmp_path: Path):
    pq.write_table(image_table([(encode_png(GREY), "0", 0), (encode_png(GREY), "1", 1)], ["a", "b"]), tmp_path / "all.parquet")
    with pytest.raises(UserError, match="holds the training images"):
        data_of(tmp_path / "all.parquet")


def test_a_copy_of_the_training_images_is_no_test_split(tmp_path: Path):
    for split in ("train", "test"):
        for label in ("a", "b"):
            write(tmp_path / split / label / "0.png")
    with pytest.raises(UserError, match="holds the training images"):
        data_of(tmp_path)


def test_copies_of_single_training_images_in_the_test_split_are_counted_aloud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for number, name in enumerate(("train/a/0.png", "train/b/1.png", "test/a/2.png", "test/b/3.png")):
        write(tmp_path / name, Image.new("L", (4, 4), number))
    data_of(tmp_path)
    assert "copies" not in capsys.readouterr().out
    write(tmp_path / "test" / "a" / "other.png", Image.new("L", (4, 4), 1))  # the training image of b
    data_of(tmp_path)
    assert "note: 1 of 3 test images are copies of training images" in capsys.readouterr().out


def test_the_test_images_are_no_set_to_be_scored(tmp_path: Path):
    for number, name in enumerate(("train/a/0.png", "train/b/1.png", "test/a/2.png", "test/b/3.png")):
        write(tmp_path / name, Image.new("L", (4, 4), number))
    plan = partial(load_config, EvaluateConfig, None)
    apart = [f"data.path={tmp_path}", "data.size=8", "data.channels=1", f"storage={tmp_path / 'runs'}"]
    make_evaluation(plan([*apart, f"sets.x={tmp_path / 'train'}"]))
    with pytest.raises(UserError, match=r"has the test images .*name a set of other images"):
        make_evaluation(plan([*apart, f"sets.x={tmp_path / 'test'}"]))


def test_one_class_is_no_data_set(tmp_path: Path):
    for split in ("train", "test"):
        write(tmp_path / split / "photos" / "x" / f"{split}.png", Image.new("L", (4, 4), len(split)))
    with pytest.raises(UserError, match="holds one class, 'photos', and students need two"):
        data_of(tmp_path)


def test_a_class_is_named_once(tmp_path: Path):
    with pytest.raises(UserError, match="names 'Bag' twice"):
        Data(load_config(RunConfig, None, ["data.classes=[Bag,Coat,Bag]"]))


def test_a_missing_split_is_answered_with_those_there_are(tmp_path: Path):
    write(tmp_path / "train" / "a" / "0.png")
    write(tmp_path / "val" / "a" / "0.png")
    with pytest.raises(UserError, match=r"it has the splits train, val: set data\.train_split and data\.test_split"):
        open_source(str(tmp_path), "test")


# Data sets as they are downloaded

WNIDS = ("n01440764", "n01443537")


def imagenet(root: Path) -> Path:
    """Two classes of ImageNet in Kaggle's layout, the second of them first among the validation images."""
    folder = root / "ILSVRC" / "Data" / "CLS-LOC"
    for wnid in WNIDS:
        write(folder / "train" / wnid / f"{wnid}_1.JPEG", GREY, "JPEG")
    for number in (1, 2, 10):
        write(folder / "val" / f"ILSVRC2012_val_{number:08d}.JPEG", GREY, "JPEG")
    return folder


WANTED = {
    (WNIDS[1], "ILSVRC2012_val_00000001.JPEG"), (WNIDS[0], "ILSVRC2012_val_00000002.JPEG"),
    (WNIDS[1], "ILSVRC2012_val_00000010.JPEG"),
}  # fmt: skip


@pytest.mark.parametrize("below", ["", "ILSVRC/Data/CLS-LOC"])
def test_imagenet_as_kaggle_has_it(below: str, tmp_path: Path):
    imagenet(tmp_path)
    rows = [f"ILSVRC2012_val_{n:08d},{WNIDS[w]} 1 2 3 4 {WNIDS[w]} 5 6 7 8" for n, w in ((10, 1), (2, 0), (1, 1))]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows, ""]))
    assert open_source(str(tmp_path / below), "train").class_names == WNIDS
    source = open_source(str(tmp_path / below), "val")
    assert source.class_names == WNIDS
    assert files_of(source) == WANTED


def test_imagenet_with_the_list_of_tensorflow(tmp_path: Path):
    folder = imagenet(tmp_path)
    list_of = folder / "imagenet_2012_validation_synset_labels.txt"
    list_of.write_text("\n".join((WNIDS[1], WNIDS[0], WNIDS[1])))
    assert files_of(open_source(str(folder), "val")) == WANTED
    list_of.write_text("\n".join(WNIDS))
    with pytest.raises(UserError, match="lists 2 classes for 3 images"):
        open_source(str(folder), "val")


def test_a_flat_folder_may_be_named_itself(tmp_path: Path):
    folder = imagenet(tmp_path)
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join((WNIDS[1], WNIDS[0], WNIDS[1])))
    assert files_of(open_source(str(folder / "val"), "test")) == WANTED
    assert open_source(str(folder / "train"), "train").class_names == WNIDS


def test_imagenets_validation_images_alone_have_no_classes(tmp_path: Path):
    folder = imagenet(tmp_path)
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("490\n361\n171\n")
    with pytest.raises(UserError, match=r"put LOC_val_solution\.csv .* in an order of its own"):
        open_source(str(folder), "val")


def test_classes_in_tar_files_are_to_be_unpacked(tmp_path: Path):
    for wnid in WNIDS:
        (tmp_path / "train").mkdir(exist_ok=True)
        (tmp_path / "train" / f"{wnid}.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"2 tar files such as 'n01440764\.tar'; unpack each into a folder of its name"):
        open_source(str(tmp_path), "train")


def test_tiny_imagenet(tmp_path: Path):
    for wnid in WNIDS:
        write(tmp_path / "train" / wnid / "images" / f"{wnid}_0.JPEG", GREY, "JPEG")
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("x")
    for number in (0, 1, 10):
        write(tmp_path / "val" / "images" / f"val_{number}.JPEG", GREY, "JPEG")
        write(tmp_path / "test" / "images" / f"test_{number}.JPEG", GREY, "JPEG")
    lines = [f"val_{n}.JPEG\t{WNIDS[w]}\t0\t32\t44\t62" for n, w in ((0, 1), (1, 0), (10, 1))]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines))
    assert files_of(open_source(str(tmp_path), "train")) == {(wnid, f"{wnid}_0.JPEG") for wnid in WNIDS}
    source = open_source(str(tmp_path), "val")
    assert source.class_names == WNIDS
    assert files_of(source) == {(WNIDS[1], "val_0.JPEG"), (WNIDS[0], "val_1.JPEG"), (WNIDS[1], "val_10.JPEG")}
    with pytest.raises(UserError, match=r"holds images without classes; .*data\.test_split=val"):
        open_source(str(tmp_path), "test")
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines[:2]))
    with pytest.raises(UserError, match=r"holds 'val_10\.JPEG', whose class is not listed"):
        open_source(str(tmp_path), "val")


# Parquet as the Hub has it


def parquet(path: Path, labels: list[int], names: list[str] | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [(encode_png(Image.new("L", (2, 2), label)), f"{i}.png", label) for i, label in enumerate(labels)]
    pq.write_table(image_table(rows, names), path)


def test_another_split_whose_name_begins_alike_is_not_read(tmp_path: Path):
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", [0, 1], ["a", "b"])
    parquet(tmp_path / "data" / "train_extra-00000-of-00001.parquet", [1, 1, 1], ["a", "b"])
    assert open_source(str(tmp_path), "train").labels.tolist() == [0, 1]


def test_several_configurations_are_not_merged(tmp_path: Path):
    for size in ("160px", "320px"):
        parquet(tmp_path / size / "train-00000-of-00001.parquet", [0, 1], ["a", "b"])
    with pytest.raises(UserError, match=rf"several folders \(160px, 320px\).*data\.path={tmp_path}/160px"):
        open_source(str(tmp_path), "train")
    assert open_source(str(tmp_path / "160px"), "train").labels.tolist() == [0, 1]


def test_the_folders_of_the_hubs_conversion_are_read(tmp_path: Path):
    parquet(tmp_path / "train" / "0000.parquet", [0, 1], ["a", "b"])
    parquet(tmp_path / "test" / "0000.parquet", [1], ["a", "b"])
    assert open_source(str(tmp_path), "train").labels.tolist() == [0, 1]
    assert open_source(str(tmp_path), "test").labels.tolist() == [1]
    (tmp_path / "default").mkdir()
    (tmp_path / "train").rename(tmp_path / "default" / "train")
    assert open_source(str(tmp_path), "train").labels.tolist() == [0, 1]


def test_a_folder_of_files_may_be_called_like_a_split(tmp_path: Path):
    parquet(tmp_path / "train" / "train-00000-of-00001.parquet", [0, 1], ["a", "b"])
    parquet(tmp_path / "train" / "test-00000-of-00001.parquet", [1], ["a", "b"])
    assert open_source(str(tmp_path / "train"), "train").labels.tolist() == [0, 1]
    assert open_source(str(tmp_path / "train"), "test").labels.tolist() == [1]


@pytest.mark.parametrize("name", ["train_part1", "train-part-0", "train.0", "train_00000", "train"])
def test_parts_are_known_by_their_usual_names(name: str, tmp_path: Path):
    parquet(tmp_path / f"{name}.parquet", [0, 1], ["a", "b"])
    assert open_source(str(tmp_path), "train").labels.tolist() == [0, 1]


def test_a_file_that_is_not_read_is_named(tmp_path: Path):
    parquet(tmp_path / "train_a.parquet", [0, 1], ["a", "b"])
    with pytest.raises(UserError, match=r"'train_a\.parquet' is not read as a part of 'train': call it train\.parquet"):
        open_source(str(tmp_path), "train")


def test_files_that_name_their_classes_differently_are_refused(tmp_path: Path):
    parquet(tmp_path / "train-00000-of-00002.parquet", [0, 1], ["cat", "dog"])
    parquet(tmp_path / "train-00001-of-00002.parquet", [0, 1], ["dog", "cat"])
    with pytest.raises(UserError, match=r"name their classes differently \(cat, dog; dog, cat\)"):
        open_source(str(tmp_path), "train")


def test_files_are_in_the_order_of_their_numbers(tmp_path: Path):
    for number in range(11):
        parquet(tmp_path / f"train-{number}.parquet", [number], [str(n) for n in range(11)])
    assert open_source(str(tmp_path), "train").labels.tolist() == list(range(11))


def test_missing_parts_are_missed(tmp_path: Path):
    parquet(tmp_path / "train-00001-of-00003.parquet", [0, 1], ["a", "b"])
    with pytest.raises(UserError, match=r"has 1 Parquet files .* whose names say that there are 3"):
        open_source(str(tmp_path), "train")


def test_splits_that_number_their_classes_differently_are_matched_by_name(tmp_path: Path):
    for number, name in enumerate(("cat", "dog", "eel")):
        write(tmp_path / "train" / name / "0.png", Image.new("L", (4, 4), 10 + number))
    rows = [(encoded(Image.new("L", (4, 4), 20 + number), "PNG"), f"{number}.png", 2 - number) for number in range(3)]
    (tmp_path / "test.parquet").write_bytes(parquet_bytes(image_table(rows, ("eel", "dog", "cat"))))
    config = WorkConfig(data=DataConfig(path=f"{tmp_path}/train", test_path=f"{tmp_path}/test.parquet", size=4))
    planner = Planner(config)
    train, test = (Encode.plan(planner, split, config.data) for split in ("train", "test"))
    for images, first in ((train, 10), (test, 20)):
        made = RealImages(config.data, images.opened, "area")
        found = [made(unit).pixels[0, 0, 0, 0].item() for position in range(3) for unit in images.units_of_class(position)]
        assert found == [first, first + 1, first + 2]
    assert "labels" not in train.params
    assert test.params["labels"] == (2, 1, 0), "what was scored by the wrong labels is not taken again"


def test_a_file_that_cannot_be_read_is_not_taken_for_a_broken_image(tmp_path: Path):
    for split, name in itertools.product(("train", "test"), ("cat", "dog")):
        write(tmp_path / split / name / f"{split}0.png")
        write(tmp_path / split / name / f"{split}1.png")
    (tmp_path / "train" / "cat" / "train0.png").write_bytes(b"no image")
    data = DataConfig(path=str(tmp_path), size=4)
    encode = Encode.plan(Planner(WorkConfig(data=data)), "train", data)
    made = RealImages(data, encode.opened, "area")
    assert len(made(encode.units[0]).broken) == 1
    (tmp_path / "train" / "cat" / "train1.png").unlink()
    with pytest.raises(FileNotFoundError):
        made(encode.units[0])
    with pytest.raises(FileNotFoundError):
        load_pixels(encode.opened, 4, 1)


@pytest.mark.parametrize(
    ("files", "overrides", "says"),
    [
        (("Train/cat/1.png", "Train/dog/1.png", "Test/cat/2.png", "Test/dog/2.png"), (),
         "holds 'Test' and 'Train', which would be read as classes; name .*: data.train_split=Train data.test_split=Test$"),
        (("Train/cat/1.png", "Train/dog/1.png", "Test/cat/2.png", "Test/dog/2.png"), ("data.test_share=0.5",),
         "holds 'Test' and 'Train', which would be read as classes; name .*: data.train_split=Train data.test_split=Test$"),
        (("Training/cat/1.png", "Training/dog/1.png", "Testing/cat/2.png", "Testing/dog/2.png", "Val/cat/3.png"), (),
         "holds 'Testing' and 'Training' and 'Val', which .*: data.train_split=Training data.test_split=Testing$"),
        (("train_set/cat/1.png", "train_set/dog/1.png"), ("data.test_share=0.5",),
         "holds 'train_set', which .*: data.train_split=train_set$"),
        (("train/1.png", "test/2.png"), (), "'test' and 'train' in .* hold images without classes; sort them"),
        (("train/cat/1.png", "train/dog/1.png"), (), "it has the split train alone: put other images into a folder 'test'"),
        (("train/cat/1.png", "train/dog/1.png", "test/cat/2.png"), (), "class 'dog' is in the training split only; give"),
        (("train/cat/1.png", "test/dog/2.png", "test/cat/2.png"), (), "class 'dog' is in the test split only; give"),
        (("train/cat/1.png", "train/dog/1.png", "test/cat/2.png"), ("data.classes=[cat, dog]",), "class 'dog' is in the train"),
        (("images.zip",), ("data.path={}/images.zip",), "is no folder and no Parquet file; unpack it"),
    ],
)  # fmt: skip
def test_what_is_missing_for_a_split_is_said(tmp_path: Path, files: tuple[str, ...], overrides: tuple[str, ...], says: str):
    for number, name in enumerate(files):
        write(tmp_path / name, Image.new("L", (4, 4), number))
    with pytest.raises(UserError, match=says) as refused:
        data_of(tmp_path, *(override.format(tmp_path) for override in overrides))
    assert "\n" not in str(refused.value)


def test_a_class_that_is_not_chosen_may_be_in_one_split_only(tmp_path: Path):
    for name in ("train/cat/1.png", "train/dog/1.png", "train/eel/1.png", "test/cat/2.png", "test/dog/2.png", "test/fox/2.png"):
        write(tmp_path / name)
    assert data_of(tmp_path, "data.classes=[cat, dog]").classes.names == ("cat", "dog")


def test_a_folder_without_a_test_split_has_a_share_set_apart(tmp_path: Path):
    for name, number in itertools.product(("cat", "dog"), range(10)):
        write(tmp_path / name / f"{number}.png", Image.new("L", (4, 4), number))
    with pytest.raises(UserError, match=r"set a share of all images apart, as in data\.test_share=0\.2"):
        data_of(tmp_path)
    data = data_of(tmp_path, "data.test_share=0.3")
    assert (data.classes.counts, len(data.test.labels)) == ((7, 7), 6)
    assert files_of(data.train).isdisjoint(files_of(data.test))
    assert "is not used" not in "".join(data.test.notices)
    for name in ("train/cat/x.png", "train/cat/y.png", "train/dog/x.png", "train/dog/y.png", "test/cat/z.png"):
        write(tmp_path / "split" / name)
    with_split = data_of(tmp_path / "split", "data.test_share=0.5")
    assert "set apart for testing (data.test_share); its split 'test' is not used" in "".join(with_split.test.notices)
    with pytest.raises(UserError, match="test_share sets images of the training split apart"):
        data_of(tmp_path, "data.test_share=0.3", f"data.test_path={tmp_path}")


@pytest.mark.parametrize(("link", "to"), [("test", "train"), ("test/b", "../train/b"), ("test/b", "../train/b/more")])
def test_a_link_to_training_images_is_no_test_split(tmp_path: Path, link: str, to: str):
    for number, name in enumerate(("a/0.png", "b/0.png", "b/more/1.png")):
        write(tmp_path / "train" / name, Image.new("L", (4, 4), number))
    if link != "test":
        write(tmp_path / "test" / "a" / "2.png", Image.new("L", (4, 4), 10))
    (tmp_path / link).symlink_to(to)
    with pytest.raises(UserError, match="holds the training images"):
        data_of(tmp_path)


def test_splits_with_some_images_in_common_are_no_copies_of_each_other(tmp_path: Path):
    """Bitmaps of one size, of which the first ones are equal."""
    for split, (number, label), image in itertools.product(("train", "test"), enumerate(("a", "b")), range(5)):
        value = 0 if number == image == 0 else 100 * number + 10 * image + len(split)
        write(tmp_path / split / label / f"{image}.bmp", Image.new("L", (4, 4), value), "BMP")
    assert len(data_of(tmp_path).test.labels) == 10


def test_a_large_copy_under_other_names_is_no_test_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ims3_ray.data.sources.base.HASH_WHOLE_BELOW", 0)
    for split, (number, label) in itertools.product(("train", "test"), enumerate(("a", "b"))):
        write(tmp_path / split / label / f"{split}.png", Image.new("L", (4, 4), number))
    with pytest.raises(UserError, match="holds the training images"):
        data_of(tmp_path)


def test_links_inside_a_class_are_told_and_not_followed(tmp_path: Path):
    """The folder of a class may be a link; what it links to may lead anywhere, and round in circles."""
    write(tmp_path / "more" / "1.png", Image.new("L", (4, 4), 1))
    write(tmp_path / "train" / "cat" / "0.png")
    (tmp_path / "train" / "cat" / "linked").symlink_to(tmp_path / "more")
    (tmp_path / "train" / "dog").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "self").symlink_to("self")
    source = open_source(str(tmp_path), "train")
    assert [source.identify(index) for index in range(len(source.labels))] == ["cat/0.png", "dog/1.png"]
    link = tmp_path / "train" / "cat" / "linked"
    assert source.notices == [
        f"'{tmp_path}/train' holds a link to a folder ('{link}') inside its classes, which is not followed"
    ]


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    write(tmp_path / "train" / "cat" / "0.png")
    monkeypatch.setattr("os.scandir", refused)
    with pytest.raises(UserError, match=r"' may not be read by this user; correct its permissions, or leave it out"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")])
def test_class_names_that_look_alike_are_equal(tmp_path: Path, forms: tuple[str, str]):
    for split, form in zip(("train", "test"), forms, strict=True):
        for number, label in enumerate(("café", "thé")):
            image = Image.new("L", (4, 4), 10 * number + len(form) + ord(form[2]) + ord(split[1]))
            write(tmp_path / split / unicodedata.normalize(form, label) / f"{split}.png", image)
    prompts = tmp_path / "prompts.yaml"
    prompts.write_text("".join(f"{unicodedata.normalize(forms[0], name)}: a cup\n" for name in ("café", "thé")))
    chosen = [unicodedata.normalize(form, name) for form, name in zip(forms, ("café", "thé"), strict=True)]
    data = data_of(tmp_path, f"data.classes=[{', '.join(chosen)}]")
    assert data.classes.names == ("café", "thé")
    assert prompts_of(data.classes.names, str(prompts)) == ("a cup", "a cup")


def test_metadata_beside_images_are_no_images(tmp_path: Path):
    write(tmp_path / "train" / "cat" / "0.png")
    write(tmp_path / "train" / "dog" / "1.png")
    pq.write_table(pa.table({"file_name": ["cat/0.png"], "text": ["a cat"]}), tmp_path / "train" / "metadata.parquet")
    assert open_source(str(tmp_path), "train").class_names == ("cat", "dog")


@pytest.mark.parametrize("path", ["./phtos", "../phtos", "bilder/vögel", "a/my--set"])
def test_a_mistyped_path_is_not_looked_for_on_the_hub(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"'{path}' does not exist; give a folder"):
        open_source(path, "train")


def test_an_image_that_was_replaced_while_the_run_works_is_noticed(tmp_path: Path):
    write(tmp_path / "train" / "cat" / "0.png")
    write(tmp_path / "train" / "dog" / "1.png")
    source = open_source(str(tmp_path), "train")
    write(tmp_path / "train" / "dog" / "1.png", Image.new("L", (40, 40)))
    source.image(0)
    with pytest.raises(UserError, match=r"dog/1\.png' has changed since it was listed"):
        source.image(1)
