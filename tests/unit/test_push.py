"""Sets and weights on the Hugging Face hub: uploaded to a stand-in for it, and read from there by other commands."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from ims3_ray.cli import ims3
from ims3_ray.commands.push import PushConfig, upload_of
from ims3_ray.data.sources import open_source
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import file_hash
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes
from ims3_ray.models.checkpoints import weights_path
from ims3_ray.models.generator import load_generator
from tests.hub import TOKEN, Hub, running_hub

CLASSES = ("Trouser", "Bag")
CONFIGS = [{"config_name": "two", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}]
CARD = f"---\n{yaml.safe_dump({'pretty_name': 'two classes', 'configs': CONFIGS, 'tags': ['synthetic']})}---\n\n# Two classes\n"


@pytest.fixture(scope="module")
def stand_in() -> Iterator[Hub]:
    with running_hub() as found:
        yield found


@pytest.fixture
def hub(stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in in place of the hub, with a cache of its own. It knows no Xet, the hub's own protocol."""
    stand_in.repositories.clear()
    monkeypatch.setattr(constants, "ENDPOINT", stand_in.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", stand_in.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    return stand_in


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command and returns what it prints."""

    def run(*words: object, code: int = 0) -> str:
        assert ims3(list(map(str, words))) == code
        said = capsys.readouterr()
        return said.out + said.err

    return run


def write_set(folder: Path, files: int) -> Path:
    """A distilled set as a run leaves it, in so many Parquet files; its images as PNG files are beside it."""
    rng = np.random.default_rng(0)
    for number in range(files):
        pixels = rng.integers(0, 256, (4, 28, 28), dtype=np.uint8)
        rows = [(encode_png(Image.fromarray(pixels[i])), f"{i}.png", i % 2) for i in range(4)]
        path = folder / "distilled" / "data" / f"train-{number:05d}-of-{files:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parquet_bytes(image_table(rows, CLASSES)))
    (folder / "distilled" / "images" / "Bag").mkdir(parents=True)
    (folder / "distilled" / "images" / "Bag" / "0.png").write_bytes(b"the same")
    (folder / "distilled" / "README.md").write_text(CARD)
    return folder


def test_a_set_is_uploaded_in_one_commit_that_replaces_an_earlier_one_and_read_by_its_name(
    hub: Hub, run: Callable[..., str], tmp_path: Path
):
    three = write_set(tmp_path / "three", 3)
    shown = run("push", str(three), "me/two-classes", "license=cc-by-4.0", "--dry-run")
    assert "license: cc-by-4.0" in shown
    assert not hub.repositories  # a dry run uploads nothing
    told = run("push", str(three), "me/two-classes")
    assert told.startswith(f"{hub.url}/datasets/me/two-classes: 3 files of ")
    assert "names no licence" in told
    pushed = hub.repositories["dataset", "me/two-classes"]
    assert len(pushed.files) == 4

    one = write_set(tmp_path / "one", 1)
    told = run("push", str(one), "me/two-classes", "license=mit", "title=Trousers and bags", "message=again")
    assert "licence" not in told
    assert sorted(pushed.files) == ["README.md", "data/train-00000-of-00001.parquet"]
    assert len(pushed.commits) == 3
    assert pushed.messages[-1] == "again"
    _, header, text = pushed.files["README.md"].decode().split("---\n")
    named = {"pretty_name": "Trousers and bags", "license": "mit"}
    assert yaml.safe_load(header) == {"configs": CONFIGS, "tags": ["synthetic"], **named}
    assert text.strip() == "# Two classes"

    read = open_source("me/two-classes", "train")
    assert (read.class_names, read.labels.tolist()) == (CLASSES, [0, 1, 0, 1])
    assert "public" in run("push", str(one), "me/two-classes", "private=true", code=2)
    assert len(pushed.commits) == 3


def test_weights_and_adapters_are_uploaded_and_read_by_their_names(hub: Hub, run: Callable[..., str], tmp_path: Path):
    generator = weights_path("embedded:fashion-mnist-dit")
    run("push", str(generator), "me/dit", "license=mit", "private=true")
    repository = hub.repositories["model", "me/dit"]
    assert repository.private
    assert sorted(repository.files) == ["README.md", "generator.safetensors"]
    card = repository.files["README.md"].decode()
    assert "ims3 distill generator=me/dit" in card
    assert "arXiv:2603.13960" in card
    run("push", str(weights_path("embedded:fashion-mnist-phi")), "me/phi", "license=mit")
    assert "generate (pretrained)" in run("distill", "generator=me/dit", "encoder=me/phi", "--dry-run")

    bias = load_generator(generator).state_dict()["blocks.0.attn.qkv.bias"] + 1
    about = {"config": {"steps": 3}, "generator": file_hash(generator)}
    shards = tmp_path / "KEY" / "shards"
    shards.mkdir(parents=True)
    (tmp_path / "KEY" / "manifest.json").write_text("{}")
    save_file({"blocks.0.attn.qkv.bias": bias}, shards / "adapter-0.safetensors", {"adapter": json.dumps(about)})
    assert "is none" not in run("push", str(tmp_path / "KEY"), "me/adapter", "license=mit")
    told = run("convert", "generator=me/dit", "adapter=hf://me/adapter/adapter-0.safetensors", "out=merged.safetensors")
    assert "10 class names" in told
    merged = load_generator(tmp_path / "merged.safetensors").state_dict()["blocks.0.attn.qkv.bias"]
    assert (merged - bias).abs().max() < 1e-3


def test_an_upload_that_the_hub_does_not_take_is_one_line(
    hub: Hub, run: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = str(write_set(tmp_path / "set", 1))
    monkeypatch.setenv("HF_TOKEN", "hf_may_read")
    told = run("push", source, "me/other", code=2)
    assert told.startswith("error: the hub refuses the upload to 'me/other' (Client error '401 Unauthorized'")
    assert "hf auth login" in told
    assert ("dataset", "me/other") not in hub.repositories
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    told = run("push", source, "me/other", "license=gpl-17", code=2)
    assert told.startswith("error: the hub does not take the upload to 'me/other': Invalid metadata in README.md.")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert run("push", source, "me/other", code=2).startswith("error: the hub cannot be reached for the upload to 'me/other'")


def refused(source: object, to: str = "me/name") -> str:
    with pytest.raises(UserError) as raised:
        upload_of(PushConfig(source=str(source), to=to))
    return str(raised.value)


def test_a_training_s_folder_gives_its_weights_with_the_card_beside_them(tmp_path: Path):
    folder = tmp_path / "my-dit"
    folder.mkdir()
    (folder / "my-dit.safetensors").write_bytes(weights_path("embedded:fashion-mnist-dit").read_bytes())
    (folder / "my-dit.md").write_text("# my-dit\n\nTrained on a laptop.\n")
    found = upload_of(PushConfig(source=f"{folder}/", to="me/dit", license="mit"))
    assert (found.kind, list(found.files)) == ("model", ["generator.safetensors"])
    assert found.card["license"] == "mit"
    assert "Trained on a laptop." in found.readme
    assert "generator=me/dit" in found.readme


def test_weights_without_a_card_are_described_by_their_metadata(tmp_path: Path):
    path = tmp_path / "phi.safetensors"
    path.write_bytes(weights_path("embedded:fashion-mnist-phi").read_bytes())
    found = upload_of(PushConfig(source=str(path), to="me/phi"))
    assert list(found.files) == ["encoder.safetensors"]
    assert "model: resnet18" in found.readme
    assert "license" not in found.card


def test_what_cannot_be_uploaded_is_named(tmp_path: Path):
    assert "ims3 push runs/demo user/name" in refused("")
    assert "does not exist" in refused(tmp_path / "nowhere")
    assert "holds no distilled set, no weights" in refused(tmp_path)
    assert "give user/mine" in refused(tmp_path, "mine")
    assert "cannot name a repository" in refused(tmp_path, "me/two words")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "none of this project's weights" in refused(tmp_path / "other.safetensors")
    (tmp_path / "other.pt").write_bytes(b"no safetensors")
    assert "none of this project's weights" in refused(tmp_path / "other.pt")
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("# a set without files")
    assert "is no distilled set" in refused(tmp_path)
    (tmp_path / "data" / "train.parquet").write_bytes(b"somebody's own data")
    assert "is no distilled set" in refused(tmp_path)  # its card is not that of an export
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n# broken")
    assert "README.md' cannot be read" in refused(tmp_path)
    shards = tmp_path / "KEY" / "shards"
    shards.mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, shards / "adapter-1.safetensors", {"adapter": "{}"})
    assert "has not ended" in refused(tmp_path / "KEY")
