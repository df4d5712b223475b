"""What a generator is told: prompts, captions and their choice by clusters of latents (D4M, DDVLCP)."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from sklearn.cluster import MiniBatchKMeans
from sklearn.neighbors import LocalOutlierFactor

from ims3_ray.config import RunConfig
from ims3_ray.data.captions import Captions, caption_of_clusters
from ims3_ray.data.prompts import prompts_of, words_of_name
from ims3_ray.data.sources import open_source
from ims3_ray.data.sources.base import Subset, first_of_each
from ims3_ray.diffusion.steering.modes import Clustering, find_modes
from ims3_ray.errors import UserError
from ims3_ray.io.parquet import image_table, parquet_bytes
from ims3_ray.io.storage import Storage
from ims3_ray.stages.captions import captions_by_class


def test_prompts_come_from_imagenet_or_the_name_or_a_file(tmp_path: Path):
    assert words_of_name("n01440764") == "tench, Tinca tinca"
    assert words_of_name("n99999999") == "n99999999"
    assert words_of_name("AnkleBoot") == "Ankle Boot"
    assert words_of_name("T-shirt_top") == "T-shirt top"
    file = tmp_path / "prompts.yaml"
    file.write_text("cat: a photo of a cat\n010: one\nyes: no\n")
    assert prompts_of(("cat", "010", "yes"), str(file)) == ("a photo of a cat", "one", "no")
    with pytest.raises(UserError, match=r"has no prompt for class 'cats' \(it has 'cat'\)"):
        prompts_of(("cats",), str(file))
    file.write_text("- cat\n")
    with pytest.raises(UserError, match="must map the name of each class to a text"):
        prompts_of(("cat",), str(file))


CAPTIONS = (
    "a brown dog on green grass",
    "a brown dog with a red ball on grass",
    "the dog runs over grass, grass everywhere",
    "a dog in snow",
    "white snow and a dog",
    "a dog sleeps on a sofa",
    "dog beside water",
    "the dog jumps into water, water splashes",
    "a wet dog on water",
    "dog",
)


def test_the_caption_of_a_cluster_says_most_of_what_its_captions_say():
    clusters = (0, 0, 0, 1, 1, -1, 2, 2, 2, 3)
    # "dog" is in all captions and is the class. Cluster 0: grass 4, brown 2, green, red, ball, runs 1 each; its captions have
    # 7, 8 and 5. Cluster 1: snow 2, white 1; 2 and 3. Cluster 2: water 4, jumps, splashes, wet 1 each; 4, 6 and 5. The caption
    # of cluster 3 has no other word, and cluster 4 has no caption.
    expected = [CAPTIONS[1], CAPTIONS[4], CAPTIONS[7], "", ""]
    assert caption_of_clusters(CAPTIONS, clusters, 5, "dog", 0.7) == expected
    # Words are looked for as parts of words: "grass" counts in "grasshopper".
    other = ("green grass", "grass", "a grasshopper on green leaves, leaves")
    assert caption_of_clusters(other, (0, 0, 0), 1, "cat", 1.0) == [other[2]]
    # Single letters do not count: the "s" of possessives is a part of most captions.
    assert caption_of_clusters(("s's s's", "shirt"), (0, 0), 1, "cat", 1.0) == ["shirt"]
    # Words that so many captions have, or that are part of the name of the class, do not count.
    assert caption_of_clusters(("red fox", "red box", "red"), (0, 0, 1), 2, "foxes", 0.7) == ["red box", ""]


def test_captions_are_matched_by_the_names_of_files(tmp_path: Path):
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / name)
    source = open_source(str(tmp_path), "train")
    names = [source.identify(index) for index in range(3)]
    file = tmp_path / "metadata.jsonl"
    file.write_text("".join(json.dumps({"file_name": name, "text": f"of {name}"}) + "\n" for name in names))
    assert Captions(str(file), source).of([0, 2]) == [f"of {names[0]}", f"of {names[2]}"]
    file.write_text('{"file_name": "elsewhere/2.png", "text": "two"}\n{"file_name": "a/1.png", "text": "x"}\n')
    assert Captions(str(file), source).of([names.index("cat/2.png")]) == ["two"]
    with pytest.raises(UserError, match=r"has no caption for the image 'dog/1\.png'"):
        Captions(str(file), source).of([names.index("dog/1.png")])
    for empty in ("null", '""', '" "'):
        file.write_text(f'{{"file_name": "dog/1.png", "text": {empty}}}\n')
        with pytest.raises(UserError, match=r"has no caption for the image 'dog/1\.png'"):
            Captions(str(file), source).of([names.index("dog/1.png")])
    file.write_text('{"file_name": "./train/dog/1.png", "text": "a line\u2028of another"}\n')
    assert Captions(str(file), source).of([names.index("dog/1.png")]) == ["a line\u2028of another"]
    file.write_text("no json\n")
    with pytest.raises(UserError, match="is neither a column of the data's Parquet files nor JSON lines"):
        Captions(str(file), source)


def test_images_that_cannot_be_decoded_leave_no_gap_in_the_captions(tmp_path: Path):
    names = ("cat/1.png", "cat/2: two.png", "cat/3.png", "dog/1.png")
    for name in names:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "train" / name)
    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps({"file_name": name, "text": f"of {name}"}) + "\n" for name in names))
    units = {"c0000-u00000": {"broken": ["cat/2: two.png: cannot identify image file"]}, "c0001-u00000": {"broken": []}}
    images = SimpleNamespace(
        opened=open_source(str(tmp_path), "train"), labels=(0, 1), units=tuple(units), manifest=lambda _: {"units": units}
    )
    config = RunConfig.model_validate({"data": {"captions": str(file)}})
    found = captions_by_class(images, config, Storage.at(str(tmp_path / "runs")))  # type: ignore[arg-type]
    assert found == {0: ["of cat/1.png", "of cat/3.png"], 1: ["of dog/1.png"]}


def test_captions_may_be_a_column_of_the_data(tmp_path: Path):
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    table = image_table([(png.getvalue(), f"{number}.png", number % 2) for number in range(4)])
    table = table.append_column("text", pa.array(["one", "two", None, " "]))
    (tmp_path / "train.parquet").write_bytes(parquet_bytes(table))
    source = open_source(str(tmp_path / "train.parquet"), "train")
    assert Captions("text", source).of([1, 0]) == ["two", "one"]
    assert Captions("text", Subset(source, first_of_each(source, 1))).of([0, 1]) == ["one", "two"]
    for empty in (2, 3):
        with pytest.raises(UserError, match=rf"has no caption for the image 'train\.parquet row {empty}'"):
            Captions("text", source).of([empty])
    for column in ("image", "label"):
        with pytest.raises(UserError, match="is neither a column"):
            Captions(column, source)
    with pytest.raises(UserError, match=r"data\.captions '.*other' is neither a column"):
        Captions("other", source)


def test_outliers_are_left_out_of_the_clusters():
    rng = np.random.default_rng(0)
    near = np.concatenate([rng.normal(at, 0.1, (30, 4)) for at in (-2, 2)])
    latents = torch.from_numpy(np.concatenate([near, [[50, 0, 0, 0], [0, 60, 0, 0]]])).float().reshape(-1, 1, 2, 2)
    found = find_modes(latents, 2, 0, Clustering(outliers=0.05))
    outside = LocalOutlierFactor(10, contamination=0.05).fit_predict(latents.flatten(1).numpy()) == -1
    assert np.array_equal(found.clusters.numpy() == -1, outside)
    assert outside[-2:].all()
    assert found.counts.sum() == (~outside).sum()
    for cluster in range(2):
        mine = latents[found.clusters == cluster]
        assert len(mine) == found.counts[cluster]
        torch.testing.assert_close(mine.mean(dim=0), found.centres[cluster], rtol=1e-4, atol=1e-4)


def test_minibatch_k_means_is_one_pass_over_the_shuffled_latents():
    rng = np.random.default_rng(0)
    latents = torch.from_numpy(rng.normal(size=(53, 4))).float().reshape(-1, 1, 2, 2)  # and three that are no whole batch
    found = find_modes(latents, 5, 3, Clustering(minibatch=2))
    theirs, flat = MiniBatchKMeans(n_clusters=5, batch_size=10, random_state=3), latents.flatten(1).numpy()
    order = np.random.default_rng(3).permutation(53)
    for start in range(0, 53, 10):
        theirs.partial_fit(flat[order[start : start + 10]])
    centres = {tuple(np.round(each, 5)) for each in theirs.cluster_centers_}
    assert {tuple(np.round(each, 5)) for each in found.centres.flatten(1).numpy()} == centres
    assert found.counts.tolist() == sorted(found.counts.tolist(), reverse=True)
    assert found.counts.tolist() == found.clusters.bincount(minlength=5).tolist()
