"""What files of others may not do: run code, start programs, leave their folder, take all memory; and secrets stay secret."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ims3_ray.compat import load_deepspeed_file
from ims3_ray.config import RunConfig
from ims3_ray.config.loading import load_config
from ims3_ray.data.classes import folder_name, folder_names, match_classes
from ims3_ray.data.decoding import decode
from ims3_ray.data.sources import open_source
from ims3_ray.errors import UserError
from ims3_ray.io.files import Place
from ims3_ray.io.listing import Listing
from ims3_ray.io.parquet import encode_png, image_table
from ims3_ray.io.storage import Storage
from ims3_ray.models.encoder import EncoderConfig
from ims3_ray.report.card import plain
from ims3_ray.tracking.entries import reason

PIXEL = encode_png(Image.new("L", (1, 1)))


class Forged:
    """Unpickled as it is, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_forged_checkpoint_of_deepspeed_runs_nothing(tmp_path: Path):
    torch.save({"module": {"weight": torch.ones(2)}, "extra": Forged(tmp_path / "ran")}, tmp_path / "states.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_deepspeed_file(str(tmp_path / "states.pt"))
    assert not (tmp_path / "ran").exists()


def test_an_image_is_of_a_kind_that_needs_no_other_program():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    assert Image.open(io.BytesIO(postscript)).format == "EPS"
    with pytest.raises(OSError, match="it is no PNG, JPEG, WEBP, BMP, GIF, TIFF or PPM file"):
        decode(postscript)


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds none."""
    chunks = b"\x89PNG\r\n\x1a\n"
    for body in (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT" + zlib.compress(b"")):
        chunks += struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return chunks


@pytest.mark.parametrize("side", [11_000, 60_000])
def test_an_image_that_promises_too_many_pixels_is_a_broken_one(side: int):
    with pytest.raises(OSError, match=r"pixels"):
        decode(png_header(side, side))


def test_idx_files_are_unpacked_no_further_than_they_say(tmp_path: Path):
    for name, shape in (("images-idx3", (1, 2, 2)), ("labels-idx1", (1,))):
        raw = struct.pack(f">HBB{len(shape)}I", 0, 8, len(shape), *shape) + bytes(50_000_000)
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(raw))
    with pytest.raises(UserError, match=r"IDX file in .* cannot be read"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["", " ", "a\nb", "x" * 300, 3, None])
def test_class_names_that_cannot_be_names_are_refused(name: object, tmp_path: Path):
    table = image_table([(PIXEL, "0.png", 0), (PIXEL, "1.png", 1)], ["whole", name])  # type: ignore[list-item]
    pq.write_table(table, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="has a class called"):
        open_source(str(tmp_path), "train")


def test_two_classes_of_one_name_are_refused(tmp_path: Path):
    pq.write_table(image_table([(PIXEL, "0.png", 0)], ["same", "same"]), tmp_path / "train.parquet")
    with pytest.raises(UserError, match="two classes called 'same'"):
        open_source(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["..", ".", "../../etc", "/etc/passwd", "a/b", "~", "$(x)"])
def test_a_folder_of_a_class_is_one_folder_below_where_it_is_made(name: str, tmp_path: Path):
    assert (tmp_path / folder_name(name)).resolve().parent == tmp_path


@pytest.mark.parametrize("name", ["Ankle boot", "Käse, jung", "C++", "日本", "50 %", "rock&roll", "a-b_c.d"])
def test_a_folder_keeps_the_spelling_of_its_class_where_file_systems_allow_it(name: str):
    assert folder_name(name) == name


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["a/b", "a_b", "A_B", "..", "."], ["a_b", "a_b-1", "A_B-2", "class", "class-4"]),
        (["x_", "x_-2", "x:"], ["x_", "x_-2", "x_-2-2"]),
        (["cat", "cat-2", "Cat"], ["cat", "cat-2", "Cat-2-2"]),
    ],
)
def test_no_two_classes_share_a_folder(names: list[str], folders: list[str]):
    assert folder_names(names) == folders


def test_folders_of_classes_whose_names_differ_in_replaced_characters_alone_are_no_set():
    assert match_classes(["a/b", "c"], ["a_b", "c"], "there") == [0, 1]
    assert match_classes(["a/b", "a:b"], ["a:b", "a/b"], "there") == [1, 0]
    for names in (["a/b", "a:b"], ["a:b", "a/b"]):
        with pytest.raises(UserError, match=f"do not say which of the classes '{names[0]}' and '{names[1]}' they hold"):
            match_classes(names, folder_names(names), "there")


@pytest.mark.parametrize("path", ["../out", "a/../../out", ".."])
def test_a_storage_is_not_left(path: str, tmp_path: Path):
    with pytest.raises(UserError, match="would leave the storage"):
        Storage.at(str(tmp_path / "storage")).write(path, b"x")
    assert not (tmp_path / "out").exists()


def test_links_to_folders_are_not_followed_round_and_round(tmp_path: Path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "0.png").write_bytes(PIXEL)
    (tmp_path / "train" / "a" / "loop").symlink_to(tmp_path / "train" / "a")
    assert [path for path, _ in Listing.below(Place.at(str(tmp_path / "train"))).rows()] == ["a/0.png"]
    assert len(open_source(str(tmp_path), "train").labels) == 1


@pytest.mark.parametrize(
    "changes", [{"model_args": {"pretrained": True}}, {"model_args": {"checkpoint_path": "/x"}}, {"model": "hf-hub:some/one"}]
)
def test_an_encoder_does_not_have_timm_fetch_weights(changes: dict[str, object]):
    shape = {"model": "resnet18", "channels": 3, "num_classes": 2, "mean": 0.0, "std": 1.0}
    with pytest.raises(ValueError, match="fetch weights from elsewhere"):
        EncoderConfig.model_validate({**shape, **changes})


def test_passwords_are_neither_stored_nor_shown():
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI") as refused:
        load_config(RunConfig, None, ["tracking.uri=http://me:PASSW0RD@mlflow:5000"])
    assert "PASSW0RD" not in str(refused.value)
    assert reason(ValueError("no answer from http://me:PASSW0RD@mlflow:5000/api")) == "no answer from http://…@mlflow:5000/api"


def test_names_are_text_in_a_card():
    assert plain("<script>\n---\na|b</script>") == "&lt;script&gt; --- a&#124;b&lt;/script&gt;"


def test_arms_have_names_that_files_can_have():
    with pytest.raises(UserError, match="arms"):
        load_config(RunConfig, None, ["arms={a/b: {title: x, images: real, select: random}}"])


def test_deepspeeds_own_checkpoints_are_read(tmp_path: Path):
    torch.save({"buffer_names": [], "ds_version": "0", "rng": np.arange(3).tolist()}, tmp_path / "own.pt")
    assert load_deepspeed_file(str(tmp_path / "own.pt"))["rng"] == [0, 1, 2]


class Written:
    """Pickled as a call of ``getattr``, as Python up to 3.11.3 writes a member of an enumeration."""

    def __init__(self, kind: object, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (self.kind, self.name)


def test_stages_that_an_older_python_wrote_are_read_and_nothing_else_is_looked_up(tmp_path: Path):
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    torch.save({"stage": Written(ZeroStageEnum, "gradients")}, tmp_path / "older.pt")
    assert load_deepspeed_file(str(tmp_path / "older.pt"))["stage"] is ZeroStageEnum.gradients
    torch.save({"stage": Written(LossScaler, "__init__")}, tmp_path / "forged.pt")
    with pytest.raises(pickle.UnpicklingError, match="no checkpoint of DeepSpeed"):
        load_deepspeed_file(str(tmp_path / "forged.pt"))
