"""What an actor of the pool does with a unit, without Ray."""

from __future__ import annotations

import itertools
import json
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load

from ims3_ray.cluster.hardware import hardware, kind
from ims3_ray.config import ActorsConfig, ClusterConfig, DataConfig, SamplingConfig, WorkConfig
from ims3_ray.engine import pool
from ims3_ray.engine.actors import units_at_once
from ims3_ray.engine.images import Derived, ImageStore, Produced, Stored
from ims3_ray.engine.noted import check_alike, commit_noted, kind_of
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.pool import pool_price
from ims3_ray.engine.sets import RealSplit
from ims3_ray.engine.shards import commit_units, note
from ims3_ray.engine.worker import Derivation, UnitWorker, Work
from ims3_ray.errors import UserError
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.parquet import encode_png
from ims3_ray.io.storage import Storage
from ims3_ray.models.dit import DiT
from ims3_ray.models.encoder import load_encoder
from ims3_ray.models.generator import load_generator
from ims3_ray.stages.adapters import Pretrained
from ims3_ray.stages.candidates import Candidates
from ims3_ray.stages.encode import Encode, RealImages
from ims3_ray.stages.features import Features
from tests.conftest import write_latent_world


def candidates(world: Path, autoencoder: Path | None = None, **changes: Any) -> Candidates:
    sampling = SamplingConfig.model_validate({"steps": 4, "unit_size": 6, "clip": autoencoder is None, **changes})
    return Candidates(sampling, Pretrained.of_file(world / "dit.safetensors"), None, autoencoder, 0, "cpu")


def made_by(worker: UnitWorker, unit: str) -> dict[str, Any]:
    """The entry of a unit of the worker's only task."""
    row: Any = {"units": [json.dumps([(0, unit)])]}
    ((task, named, entry),) = json.loads(worker(row)["entries"][0])
    assert (task, named) == (0, unit)
    found: dict[str, Any] = entry
    return found


def test_a_row_of_units_is_made_one_after_another_and_one_that_fails_stops_no_other(tmp_path: Path):
    def produce(unit: str) -> Produced:
        if unit == "c0000-u00001":
            raise ValueError("a bad one")
        return Produced(torch.zeros(int(unit[-1]) + 1, 1, 4, 4, dtype=torch.uint8), [])

    works = [Work(lambda _: produce, None, (), Artifact(Storage.at(str(tmp_path)), "encode", str(task))) for task in range(2)]
    pairs = [(0, "c0000-u00000"), (0, "c0000-u00001"), (1, "c0000-u00002")]
    row: Any = {"units": [json.dumps(pairs)]}
    found = json.loads(UnitWorker(works, 1, 1, lambda: "cpu")(row)["entries"][0])
    assert [(task, unit) for task, unit, _ in found] == pairs
    assert [entry.get("images", entry.get("error")) for _, _, entry in found] == [1, "ValueError: a bad one", 3]


def test_units_go_out_singly_to_few_actors_and_by_the_ten_to_many():
    assert [units_at_once(20_000, actors) for actors in (1, 8, 99, 100, 250, 500, 1000)] == [1, 1, 1, 2, 4, 2, 1]
    assert [units_at_once(10**6, actors) for actors in (8, 100, 500, 1000, 5000)] == [1, 2, 10, 10, 10]
    assert units_at_once(1, 1000) == 1


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++2m"])
def test_an_image_depends_on_its_class_and_index_alone(tiny_world: Path, sampler: str):
    whole = candidates(tiny_world, sampler=sampler)("c0001-u00000").pixels
    assert torch.equal(whole, candidates(tiny_world, sampler=sampler)("c0001-u00000").pixels)
    alone = torch.cat(
        [candidates(tiny_world, sampler=sampler, unit_size=1)(f"c0001-u{index:05d}").pixels for index in range(6)]
    )
    assert (whole.int() - alone.int()).abs().max() <= 1
    assert (whole[0].int() - whole[1].int()).abs().max() > 1
    assert not torch.equal(whole, candidates(tiny_world, sampler=sampler)("c0002-u00000").pixels)


def test_other_numbers_of_threads_give_the_same_images(tiny_world: Path):
    before = torch.get_num_threads()
    drawn = []
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        drawn.append(candidates(tiny_world)("c0001-u00000").pixels.int())
    torch.set_num_threads(before)
    assert max((drawn[0] - other).abs().max() for other in drawn[1:]) <= 1


def test_out_of_memory_the_batch_is_halved_and_that_is_recorded(tiny_world: Path, monkeypatch: pytest.MonkeyPatch):
    expected, batches, forward = candidates(tiny_world)("c0000-u00001"), [], DiT.forward
    limit = 2

    def small(self: DiT, z: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        batches.append(len(z) // 2)
        if len(z) > 2 * limit:  # images, conditional and not
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, z, *rest)

    monkeypatch.setattr(DiT, "forward", small)
    produce = candidates(tiny_world)
    found = produce("c0000-u00001")
    assert (expected.batch, found.batch) == (None, 2)
    assert (found.pixels.int() - expected.pixels.int()).abs().max() <= 1
    assert batches[:3] == [6, 3, 2]
    batches.clear()
    assert len(produce("c0000-u00002").pixels) == 6
    assert max(batches) == 2, "the next unit begins with what sufficed"
    limit = 1
    again = produce("c0000-u00001")  # and halves it once more where it has to
    assert (len(again.pixels), again.batch) == (6, 1)
    assert (again.pixels.int() - expected.pixels.int()).abs().max() <= 1

    def never(self: DiT, *_: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DiT, "forward", never)
    with pytest.raises(torch.OutOfMemoryError):
        candidates(tiny_world)("c0000-u00000")


def test_bfloat16_changes_an_image_little(tiny_world: Path):
    exact, rounded = (candidates(tiny_world, precision=precision)("c0001-u00000").pixels for precision in ("fp32", "bf16"))
    off = (exact.int() - rounded.int()).abs().float()
    assert 0 < off.mean() < 6


@pytest.mark.parametrize("form", ["pixels", "png", "latents"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_shard_gives_back_what_was_put(form: str, channels: int, tmp_path: Path):
    write_latent_world(tmp_path)
    made = candidates(tmp_path, tmp_path / "vae" / "diffusion_pytorch_model.safetensors", unit_size=11)
    produced = made("c0002-u00003")
    assert produced.names[0] == "c0002/000033"
    if form != "latents" and channels == 3:
        produced = Produced(produced.pixels.expand(-1, 3, -1, -1).contiguous(), produced.names)
    store: Any = ImageStore(Artifact(Storage.at(str(tmp_path)), "generate", "k"), form)
    store.write("c0002-u00003", produced, ThreadPoolExecutor(2))
    decoder = made.decoder if form == "latents" else None
    assert torch.equal(store.read("c0002-u00003", decoder), produced.pixels)
    assert torch.equal(
        store.unpack(store.artifact.read(f"c0002-u00003.{store.suffix}"), decoder, [1, 8, 10]), produced.pixels[[1, 8, 10]]
    )
    if form == "latents":
        latents = load(store.artifact.read("c0002-u00003.safetensors"))["latents"]
        assert latents.dtype == torch.float16
    if form == "png":
        import pyarrow.parquet as pq

        rows = pq.read_table(tmp_path / store.artifact.folder / "shards" / "c0002-u00003.parquet").to_pylist()
        assert [row["image"]["path"] for row in rows[:2]] == ["c0002/000033.png", "c0002/000034.png"]
        assert {row["label"] for row in rows} == {2}


def test_features_that_are_not_finite_name_the_image(tiny_world: Path):
    features = Features(load_encoder(tiny_world / "phi.safetensors"), "cpu")
    produced = candidates(tiny_world)("c0001-u00002")
    whole = load(features("c0001-u00002", produced).data)["features"]

    class Broken(torch.nn.Module):
        dim = features.encoder.dim

        def look(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            found = whole.clone()
            found[4, 0] = float("nan")
            return found, found

    features.encoder = Broken()
    with pytest.raises(ValueError, match="φ gives values that are not finite for c0001/000016"):
        features("c0001-u00002", produced)


def test_what_the_classifier_says_lies_beside_the_features(tiny_world: Path):
    produced = candidates(tiny_world)("c0001-u00000")
    found = load(Features(load_encoder(tiny_world / "phi.safetensors"), "cpu", {"1": 2})("c0001-u00000", produced).data)
    with torch.inference_mode():
        logits = load_encoder(tiny_world / "phi.safetensors").logits(produced.pixels.float() / 127.5 - 1)
    torch.testing.assert_close(found["log_probability"], logits.log_softmax(dim=1)[:, 2])
    assert torch.equal(found["recognised"], logits.argmax(dim=1) == 2)


def test_hardware_has_a_name_and_a_kind():
    mine = hardware("cpu")
    assert mine["device"]
    assert mine["driver"] == ""
    assert kind(mine) == f"{mine['device']} with torch {torch.__version__}"


def test_the_price_of_a_pool_is_that_of_what_its_actors_reserve():
    actors = ActorsConfig(count=4, cpus=2, gpus=0.5)
    assert pool_price(actors, ClusterConfig()) == 0
    assert pool_price(actors, ClusterConfig(gpu_price=3.0)) == pytest.approx(6.0)
    assert pool_price(actors, ClusterConfig(gpu_price=3.0, cpu_price=0.1)) == pytest.approx(6.8)


def test_a_compiled_generator_draws_the_same(tiny_world: Path, monkeypatch: pytest.MonkeyPatch):
    compiled: list[Any] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append((type(self).__name__, options)))
    expected, found = (candidates(tiny_world, compile=flag)("c0001-u00000").pixels for flag in (False, True))
    assert torch.equal(expected, found)
    assert compiled == [("DiTBlock", {"dynamic": False})] * len(load_generator(tiny_world / "dit.safetensors").blocks)


def test_features_are_the_same_where_memory_holds_fewer_images_at_a_time(tiny_world: Path):
    produced = candidates(tiny_world)("c0001-u00002")
    features = Features(load_encoder(tiny_world / "phi.safetensors"), "cpu")
    whole, look = load(features("c0001-u00002", produced).data)["features"], features.encoder.look

    def small(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return look(x)

    features.encoder.look = small
    torch.testing.assert_close(load(features("c0001-u00002", produced).data)["features"], whole, rtol=1e-4, atol=1e-5)


def test_after_its_device_has_failed_an_actor_leaves_the_next_unit_to_a_new_process(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def broken(unit: str) -> Produced:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left

    monkeypatch.setattr("ims3_ray.engine.worker.os._exit", leave)
    monkeypatch.setattr("ims3_ray.engine.worker.GRACE_S", 0.0)
    work = Work(lambda device: broken, None, (), Artifact(Storage.at(str(tmp_path)), "generate", "k"))
    worker = UnitWorker([work], 1, 1, lambda: "cpu")
    assert "illegal memory access" in made_by(worker, "c0000-u00000")["error"]
    with pytest.raises(Left):
        made_by(worker, "c0000-u00000")


@pytest.mark.parametrize("broken", [False, True])
def test_images_that_are_not_stored_are_decoded_again(tmp_path: Path, broken: bool):
    source = tmp_path / "photos"
    for split, (label, name), number in itertools.product(("train", "test"), enumerate(("cat", "dog")), range(5)):
        file = source / split / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(Image.fromarray(np.full((4, 4), 100 * label + number + 50 * (split == "test"), np.uint8))))
    if broken:
        (source / "train" / "dog" / "1.png").write_bytes(b"none")
    data = DataConfig(path=str(source), size=4, unit_size=3, keep=False)
    encode = Encode.plan(Planner(WorkConfig(data=data)), "train", data)
    assert not encode.keeps
    assert encode.stored == 0
    storage = Storage.at(str(tmp_path / "runs"))
    noted, made = encode.artifact(storage), RealImages(data, encode.opened, "area")
    kept = UnitWorker([Work(lambda _: made, encode.store(storage), (), noted)], 1, 1, lambda: "cpu")
    passing = UnitWorker([Work(lambda _: made, None, (), noted)], 1, 1, lambda: "cpu")
    entries = {}
    for number, unit in enumerate(encode.units):
        entries[unit] = made_by(kept if number == 0 else passing, unit)
    commit_units(noted, entries, 0.0)
    assert {name for name in noted.shards() if not name.endswith(".json")} == {f"{encode.units[0]}.safetensors"}
    store = pickle.loads(pickle.dumps(encode.store(storage)))
    dogs = [100, 102, 103, 104] if broken else [100, 101, 102, 103, 104]
    assert store.read_units(encode.units)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, *dogs]
    assert store.read(encode.units[2])[:, 0, 0, 0].tolist() == dogs[: 2 if broken else 3]
    some = {encode.units[0]: [2], encode.units[2]: [0, 1], encode.units[3]: [1]}
    assert store.read_some(some)[:, 0, 0, 0].tolist() == [2, *dogs[:2], 104]
    assert encode.lost(noted) == []
    split = RealSplit.of(encode, storage)
    assert split.read()[1].tolist() == [0] * 5 + [1] * len(dogs)
    again = Stored(store, "cpu")(encode.units[3])
    assert again.pixels[:, 0, 0, 0].tolist() == [103, 104]


def test_splits_of_more_than_fifty_gigabytes_are_not_stored_unless_the_config_says_so(monkeypatch: pytest.MonkeyPatch):
    def planned(**changes: Any) -> bool:
        data = DataConfig.model_validate({"path": "embedded:fashion-mnist", **changes})
        return Encode.plan(Planner(WorkConfig(data=data)), "train", data).keeps

    assert planned()
    assert not planned(keep=False)
    monkeypatch.setattr("ims3_ray.stages.encode.KEPT_BYTES", 1000)
    assert not planned()
    assert planned(keep=True)


def test_files_are_decoded_while_the_gpu_has_the_unit_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ims3_ray.engine.worker.hardware", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    events, second_decoded = list[str](), threading.Event()

    class Decode:
        on_host = True

        def __call__(self, unit: str) -> Produced:
            events.append(f"decoded {unit}")
            if unit == "c0000-u00001":
                second_decoded.set()
            return Produced(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), ["a", "b"])

    def embed(unit: str, produced: Produced) -> Derived:
        assert unit != "c0000-u00000" or second_decoded.wait(30), "the second unit waits for the first"
        events.append(f"embedded {unit}")
        return Derived("bin", b"x")

    storage = Storage.at(str(tmp_path))
    noted, embedded = Artifact(storage, "encode", "k"), Artifact(storage, "embed", "k")
    work = Work(lambda _: Decode(), None, (Derivation(lambda _: embed, embedded),), noted)
    worker = UnitWorker([work], 1, 1, lambda: "cuda:0")
    with ThreadPoolExecutor(2) as calls:
        first = calls.submit(made_by, worker, "c0000-u00000")
        while not events:
            time.sleep(0.01)
        second = calls.submit(made_by, worker, "c0000-u00001")
        assert ["error" in call.result() for call in (first, second)] == [False, False], first.result()
    assert events.index("decoded c0000-u00001") < events.index("embedded c0000-u00000")
    assert len(events) == 4


def test_samples_that_were_refused_are_refused_again_before_others_are_made(monkeypatch: pytest.MonkeyPatch):
    made: list[object] = []
    monkeypatch.setattr(pool, "commit_noted", lambda *_: None)
    monkeypatch.setattr(pool, "_tasks", lambda context, pools, only=None: [Mock(count=1.0, only=only)])
    monkeypatch.setattr(pool, "run_tasks", lambda context, tasks: made.extend(task.only for task in tasks))
    refusing, silent = Mock(), Mock()
    refusing.check.side_effect = UserError("φ recognises too few")
    long, short = Mock(), Mock()
    long.looked_at_first.return_value, long.missing.return_value = ["first"], ["second"]
    short.looked_at_first.return_value, short.missing.return_value = [], ["first", "second"]
    for _ in range(2):
        with pytest.raises(UserError, match="φ recognises too few"):
            pool.produce(Mock(), {short: [silent], long: [refusing]})
    assert made == [{short: set(), long: {"first"}}] * 2
    silent.check.assert_not_called()
    long.missing.return_value = []
    pool.produce(Mock(), {long: [refusing]})
    assert made[2:] == [None]


def test_an_interrupted_pass_over_images_that_are_not_stored_goes_on(tmp_path: Path):
    for split, name in itertools.product(("train", "test"), ("cat", "dog")):
        file = tmp_path / "photos" / split / name / f"{split}.png"
        file.parent.mkdir(parents=True)
        file.write_bytes(encode_png(Image.fromarray(np.full((4, 4), len(split), np.uint8))))
    for keep in (False, True):
        data = DataConfig(path=str(tmp_path / "photos"), size=4, keep=keep)
        config, storage = WorkConfig(data=data), Storage.at(str(tmp_path / f"runs-{keep}"))
        encode = Encode.plan(Planner(config), "train", data)
        entry = {"images": 1, "broken": [], "seconds": 1.0, "hardware": {"device": "a CPU", "torch": "2"}}
        note(encode.artifact(storage), encode.units[0], entry)
        commit_noted(Mock(config=config, storage=storage), encode, encode, ())
        assert encode.missing(storage) == list(encode.units if keep else encode.units[1:]), "a kept image needs its shard"


def test_a_pool_that_was_begun_on_two_kinds_of_hardware_goes_on_on_the_one_that_made_most(tmp_path: Path):
    for split, name, number in itertools.product(("train", "test"), ("cat", "dog"), range(2)):
        file = tmp_path / "photos" / split / name / f"{split}-{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode_png(Image.fromarray(np.full((4, 4), number + len(split), np.uint8))))
    data = DataConfig(path=str(tmp_path / "photos"), size=4, keep=False, unit_size=1)
    config, storage = WorkConfig(data=data), Storage.at(str(tmp_path / "runs"))
    encode = Encode.plan(Planner(config), "train", data)
    for unit, device in zip(encode.units, ("a laptop", "a GPU", "a GPU", "a laptop"), strict=True):
        entry = {"images": 1, "broken": [], "seconds": 1.0, "hardware": {"device": device, "torch": "2"}}
        if unit != encode.units[3]:
            note(encode.artifact(storage), unit, entry)
    encode.__class__ = type("Alike", (Encode,), {"same_hardware": True})
    commit_noted(Mock(config=config, storage=storage), encode, encode, ())
    assert encode.missing(storage) == [encode.units[0], encode.units[3]]
    entry = {"hardware": {"device": "a laptop", "torch": "2"}}
    artifact = encode.artifact(storage)
    note(artifact, encode.units[0], entry)
    with pytest.raises(UserError, match=r"use a GPU.*or delete '.*encode/"):
        check_alike(kind_of(storage, encode), artifact, encode.units[0], entry)
