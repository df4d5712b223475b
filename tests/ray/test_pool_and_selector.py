"""The candidate pool and the S3 actor: what fails, what is extended, what is chosen from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load

from ims3_ray import UserError
from ims3_ray.cli import main
from ims3_ray.config import RunConfig
from ims3_ray.data.sources import open_source
from ims3_ray.engine import per_class
from ims3_ray.engine.images import Produced
from ims3_ray.engine.noted import check_alike
from ims3_ray.engine.pool import Task, produce, run_tasks
from ims3_ray.engine.sets import read_set
from ims3_ray.engine.shards import by_class
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.errors import IncompletePool
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage
from ims3_ray.plan import make_plan
from ims3_ray.seeds import generator_for
from ims3_ray.selection import SELECTORS, ClassImages, ClassSelector, centroid, select_subgroups
from ims3_ray.selection.s3 import S3
from ims3_ray.stages import select
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.s3 import NAMESPACE, Part, S3Selector, actor_name, start_selector
from ims3_ray.stages.select import Select
from tests.conftest import write_latent_world
from tests.ray.conftest import Run, prepare

CLASS_SELECTORS = {name: kind() for name, kind in SELECTORS.items() if issubclass(kind, ClassSelector)}
UNITS = ["c0000-u00000", "c0000-u00001", "c0001-u00000"]


class FailsAtFirst:
    """Makes a unit of one image; ``bad`` fails as often as there are ``failures``, counted in files."""

    def __init__(self, folder: Path, bad: str, failures: int, device: str) -> None:
        self.folder, self.bad, self.failures = folder, bad, failures

    def __call__(self, unit: str) -> Produced:
        if unit == self.bad:
            tries = len(list(self.folder.glob("try-*")))
            (self.folder / f"try-{tries}").touch()
            if tries < self.failures:
                raise RuntimeError("no such luck")
        return Produced(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), [unit])


def encode_of(units: Sequence[str]) -> Encode:
    source = open_source("embedded:fashion-mnist", "test")
    return Encode("encode", {}, units=tuple(units), images=3, labels=(0, 1, 2), unit_size=12, data_source=source)


def make(world: Path, folder: Path, failures: int) -> Artifact:
    context, _ = prepare(world, folder, actors={"count": 1, "max_attempts": 2})
    stage = encode_of(UNITS)
    try:
        run_tasks(context, [Task(partial(FailsAtFirst, folder, UNITS[1], failures), stage, (), UNITS)])
    finally:
        manifest = stage.manifest(context.storage) or {}
        assert {UNITS[0], UNITS[2]} <= manifest["units"].keys()
    return stage.artifact(context.storage)


def test_a_unit_that_fails_is_tried_again_then_recorded_and_named_with_its_images_while_the_others_are_kept(
    tiny_world: Path, cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def run(_: RunConfig) -> None:
        make(tiny_world, tmp_path, failures=3)  # two attempts a command

    assert main("", RunConfig, run, arguments=[]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: encode: 1 of 3 units failed every attempt, images missing: left 12–23; ")
    assert f"{UNITS[1]}: RuntimeError: no such luck" in line
    artifact = encode_of(UNITS).artifact(Storage.at(str(tmp_path)))
    assert (artifact.manifest() or {})["failed"] == {UNITS[1]: "RuntimeError: no such luck"}

    assert main("", RunConfig, run, arguments=[]) == 0
    artifact.look_again()
    manifest = artifact.manifest() or {}
    assert manifest["units"].keys() == set(UNITS)
    assert manifest["failed"] == {}
    for unit, entry in manifest["units"].items():
        assert {**entry, "derived": {}} == json.loads(artifact.read(f"{unit}.json"))
        assert entry["hardware"]["torch"] == torch.__version__
        assert entry["hardware"]["device"]


def hashes(storage: Storage, *stages: Stage) -> dict[str, tuple[str, ...]]:
    """Unit → hash of its shard in each stage."""
    manifests = [(stage.manifest(storage) or {})["units"] for stage in stages]
    return {unit: tuple(units[unit]["sha256"] for units in manifests) for unit in manifests[0]}


def test_a_larger_pool_makes_only_what_is_missing(tiny_world: Path, tmp_path: Path, cluster: None):
    outcomes = []
    for small in ({"images_per_class": 2, "groups": 2}, {"images_per_class": 3, "groups": 3}):
        context, stages = prepare(tiny_world, tmp_path, selection=small)
        generate, embed = stages["generate", "pretrained"], stages["embed", "pretrained"]
        folder = tmp_path / generate.artifact(context.storage).folder / "shards"
        times = {file: file.stat().st_mtime_ns for file in folder.iterdir()} if folder.exists() else {}
        produce(context, {generate: [embed]})
        outcomes.append(hashes(context.storage, generate, embed))
        assert {file: file.stat().st_mtime_ns for file in times} == times
    assert outcomes[1].keys() == set(generate.units)
    assert len(outcomes[0]) == 3 < len(outcomes[1]) == 9
    assert {unit: outcomes[1][unit] for unit in outcomes[0]} == outcomes[0]


def test_images_of_another_kind_of_hardware_are_no_part_of_the_pool(tiny_run: Run, tmp_path: Path):
    noted = Artifact(Storage.at(str(tmp_path)), "generate", "mine")
    a, newer, b = ({"hardware": {"device": device, "driver": "1", "torch": torch}} for device, torch in ("A2", "A3", "B2"))
    noted.write(f"{UNITS[2]}.json", json.dumps(b).encode())
    assert check_alike("", noted, UNITS[0], a) == "A with torch 2"
    assert check_alike("A with torch 2", noted, UNITS[1], {"hardware": {**a["hardware"], "driver": "7"}}) == "A with torch 2"
    assert check_alike(None, noted, UNITS[1], b) is None
    for other in (newer, b):
        noted.write(f"{UNITS[2]}.json", json.dumps(other).encode())
        with pytest.raises(UserError, match=r"the pool's other images on A with torch 2: .* pool.mix_hardware=true"):
            check_alike("A with torch 2", noted, UNITS[2], other)
        assert noted.shards() == set()


def test_a_run_that_was_interrupted_keeps_what_it_has_noted_but_for_images_of_other_hardware(tiny_run: Run, tmp_path: Path):
    shutil.copytree(Path(tiny_run.config.storage) / "artifacts", tmp_path / "artifacts")
    config = RunConfig.model_validate({**tiny_run.config.model_dump(), "storage": str(tmp_path)})
    plan, storage = make_plan(config), Storage.at(str(tmp_path))
    context = Context(config, storage, plan.classes, None)  # type: ignore[arg-type]
    nodes = {(s.name, s.label): s for s in plan.stages}
    generate, embed = nodes["generate", "pretrained"], nodes["embed", "pretrained"]
    whole = hashes(storage, generate, embed)
    for stage in (generate, embed):
        storage.delete_file(f"{stage.artifact(storage).folder}/manifest.json")  # as if it had been killed before the commit
    foreign = generate.units[4]
    note = json.loads(generate.artifact(storage).read(f"{foreign}.json"))
    note["hardware"]["device"] = "Another Processor"
    generate.artifact(storage).write(f"{foreign}.json", json.dumps(note).encode())
    shards = tmp_path / generate.artifact(storage).folder / "shards"
    before = {file: file.stat().st_mtime_ns for file in shards.iterdir() if foreign not in file.name}

    produce(context, {generate: [embed]})
    assert hashes(storage, generate, embed) == whole
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert json.loads(generate.artifact(storage).read(f"{foreign}.json"))["hardware"] != note["hardware"]


def test_a_storage_error_loses_nothing(tiny_world: Path, tmp_path: Path, tiny_run: Run):
    """A folder lies where a shard has to go: every attempt fails until it is gone."""
    context, stages = prepare(tiny_world, tmp_path, actors={"count": 1, "max_attempts": 1})
    generate, embed = stages["generate", "pretrained"], stages["embed", "pretrained"]
    unit = generate.units[3]
    obstacle = tmp_path / embed.artifact(context.storage).folder / "shards" / f"{unit}.safetensors"
    (obstacle / "in the way").mkdir(parents=True)
    with pytest.raises(IncompletePool, match=rf"images missing: right 4–7; {unit}: UserError: cannot write .*{unit}"):
        produce(context, {generate: [embed]})
    assert not list(tmp_path.rglob("*.tmp"))
    (obstacle / "in the way").rmdir()
    obstacle.rmdir()
    produce(context, {generate: [embed]})
    undisturbed = [s for s in tiny_run.plan.stages if s.label == "pretrained"]
    assert hashes(context.storage, generate, embed) == hashes(tiny_run.storage, *undisturbed)


def test_latents_are_decoded_again_to_the_very_images_that_were_seen(tiny_world: Path, tmp_path: Path, encoded: Path):
    """Stored as latents or as PNG: the same embeddings and the same chosen images, byte for byte, by two samplers."""
    write_latent_world(tmp_path)
    arms = {name: {"title": name, "images": "generated", "select": name} for name in ("s3", "random")}
    outcomes = []
    for form in ("png", "latents"):
        context, stages = prepare(
            tiny_world, tmp_path, encoded, generator=str(tmp_path / "dit.safetensors"), autoencoder=str(tmp_path / "vae"),
            sampling={"clip": False, "sampler": "ddpm", "precision": "bf16", "unit_size": 10}, arms=arms, export="s3",
            selection={"images_per_class": 3, "groups": 4}, pool={"store": form},
        )  # fmt: skip
        storage = context.storage
        generate, embed = stages["generate", "pretrained"], stages["embed", "pretrained"]
        listeners = Select.listen(context, [stages["select", "s3"], stages["select", "random"]], [generate, embed])
        ((listener,),) = listeners.values()
        context.listeners = listeners
        produce(context, {generate: [embed]})
        progress = ray.get(listener.selector.progress.remote())
        assert progress["candidates"] == (6, 6), "every unit was put while candidates were made"
        store = generate.store(storage)
        if form == "latents":
            latents = load(store.artifact.read(f"{generate.units[0]}.safetensors"))["latents"]
            assert (latents.shape, latents.dtype) == ((10, 2, 4, 4), torch.float16)
        found = {}
        for label in arms:
            stages["select", label].run(context)
            found[label] = read_set(stages["select", label].artifact(storage))[0]
        shards = [embed.artifact(storage).read(f"{unit}.safetensors") for unit in embed.units]
        outcomes.append((found, shards, {label: stages["select", label].identity(storage) for label in found}))
    assert outcomes[0][1:] == outcomes[1][1:]
    for label, pixels in outcomes[0][0].items():
        assert len(pixels) == 9
        assert torch.equal(pixels, outcomes[1][0][label])


def features_of(run: Run, kind: str, label: str) -> dict[int, torch.Tensor]:
    (node,) = [s for s in run.plan.stages if (s.name, s.label) == (kind, label)]
    artifact = node.artifact(run.storage)
    return {
        label: torch.cat([load(artifact.read(f"{unit}.safetensors"))["features"] for unit in units])
        for label, units in by_class(node.units).items()
    }


def small_parts(candidates: torch.Tensor, references: torch.Tensor, folder: Path) -> dict[str, Part]:
    """Two classes: candidates [2, 3, D] and one real image each; nothing is committed."""
    storage = Storage.at(str(folder))
    first, counts = {f"c{c:04d}-u00000": 0 for c in range(2)}, {0: 3, 1: 3}
    return {
        "candidates": Part(Artifact(storage, "embed", "mine"), (0, 1), first, counts, 1, 3),
        "references": Part(Artifact(storage, "embed", "real"), (0, 1), first, {0: 1, 1: 1}, 1, 1, seed=0),
    }


def test_the_selector_counts_a_contribution_once_and_refuses_those_of_another_run(tmp_path: Path):
    candidates = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    real = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(1)).double()
    parts = small_parts(candidates, real, tmp_path)
    selector = S3Selector(parts, S3())
    assert selector.select() is None
    assert selector.scores() == {"classes": []}
    for _ in range(3):
        for c in (1, 0):
            unit = f"c{c:04d}-u00000"
            selector.put("candidates", "mine", unit, parts["candidates"].sums(unit, candidates[c]))
            selector.put("references", "real", unit, parts["references"].sums(unit, real[c]))
            if c == 1:
                assert selector.scores()["classes"] in ([1], [0, 1])
    selection, expected = selector.select(), select_subgroups(candidates, real[:, 0], alpha=0.4, beta=0.9)
    assert selection is not None
    assert torch.equal(selection.groups, expected.groups)
    assert selection.objective == pytest.approx(expected.objective)
    assert selector.scores()["score"] == selection.score_CG.tolist()
    for key, unit in (("theirs", "c0000-u00000"), ("mine", "c0000-u00007")):
        with pytest.raises(ValueError, match="is no part of this selection, whose candidates are embeddings mine"):
            selector.put("candidates", key, unit, {})


@pytest.mark.parametrize(("size", "expected"), [(4, 4), (10, 10), (99, 10)])
def test_references_are_a_seeded_choice_of_k_i_images(size: int, expected: int, tmp_path: Path):
    embeddings = Artifact(Storage.at(str(tmp_path)), "embed", "real")
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(2))
    drawn = {}
    for seed in (0, 0, 1):
        part = Part(embeddings, (7,), {"c0007-u00000": 0, "c0007-u00001": 6}, {7: 10}, size, 1, seed)
        members = part.group_of(7) == 0
        assert members.sum() == expected
        total = sum(part.sums(unit, rows).get(0, 0) for unit, rows in zip(part.first, features.split(6), strict=True))
        assert total / (total**2).sum() ** 0.5 == pytest.approx(centroid(features[torch.from_numpy(members)]).numpy())
        drawn.setdefault(seed, []).append(members.tolist())
    assert drawn[0][0] == drawn[0][1]
    assert (drawn[0][0] != drawn[1][0]) == (size == 4)


def test_partial_scores_and_progress_while_candidates_are_made(tiny_run: Run):
    """An actor that started before some shards were there learns of the rest by puts, or reads them when asked to."""
    (stage,) = [s for s in tiny_run.plan.stages if (s.name, s.label) == ("select", "ims3")]
    expected = (stage.manifest(tiny_run.storage) or {})["table"]
    context: Any = Context(tiny_run.config, tiny_run.storage, tiny_run.plan.classes, None)
    parts = select.parts_of(context, stage)
    whole = S3Selector(parts, stage.selector)
    assert whole.progress() == {"candidates": (6, 6), "references": (9, 9)}
    held_back = parts["candidates"].embeddings
    late = S3Selector({**parts, "candidates": Part(**{**vars(parts["candidates"]), "first": {}})}, stage.selector)
    late.parts = parts
    assert late.progress() == {"candidates": (0, 6), "references": (9, 9)}
    for unit in list(parts["candidates"].first)[:4]:  # two classes of three
        features = load(held_back.read(f"{unit}.safetensors"))["features"]
        late.put("candidates", held_back.key, unit, parts["candidates"].sums(unit, features))
    assert late.progress()["candidates"] == (4, 6)
    assert late.select() is None
    partial_table = late.scores()
    assert partial_table["classes"] == [0, 1]
    assert partial_table["proximity"] == [pytest.approx(row) for row in expected["proximity"][:2]]
    late.refresh()
    assert late.scores()["score"] == [pytest.approx(row) for row in expected["score"]]


def test_candidates_can_be_their_own_reference(tiny_run: Run):
    """Table 13: the real centroids are replaced by those of the whole pool of each class."""
    other = tiny_run.config.model_dump() | {"name": "generated-references"}
    other["selection"] |= {"references": "generated"}
    plan = make_plan(RunConfig.model_validate(other))
    (stage,) = [s for s in plan.stages if (s.name, s.label) == ("select", "ims3")]
    context: Any = Context(plan.config, tiny_run.storage, plan.classes, None)
    stage.run(context)
    features = features_of(tiny_run, "embed", "fine-tuned")
    candidates = torch.stack([torch.stack([centroid(g) for g in f[:6].split(2)]) for f in features.values()])
    references = torch.stack([centroid(f[:6]) for f in features.values()])  # of the pool; units hold eight
    expected = select_subgroups(candidates, references, alpha=0.4, beta=0.9)
    table = (stage.manifest(tiny_run.storage) or {})["table"]
    assert table["groups"] == expected.groups.tolist()
    assert table["objective"] == pytest.approx(expected.objective)


def test_every_selector_chooses_from_the_same_pool_and_from_real_images(tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    arms: dict[str, Any] = {}
    for name in CLASS_SELECTORS:
        for per in ("image", "group"):
            for images in ("real", "generated"):
                arms[f"{name}-{per}-{images}"] = {
                    "title": f"{name} {per} {images}",
                    "images": images,
                    "select": name,
                    "per": per,
                }
    other = tiny_run.config.model_dump() | {"name": "selectors", "arms": arms, "export": "first-image-real"}
    plan = make_plan(RunConfig.model_validate(other))
    assert {stage.name for stage in plan.stages if stage.missing(tiny_run.storage)} == {"select", "evaluate", "export"}
    context: Any = Context(plan.config, tiny_run.storage, plan.classes, None)
    nodes = {(s.name, s.label): s for s in plan.stages}
    monkeypatch.setattr(per_class, "CLASSES_PER_TASK", 2)  # so that tasks do it
    for arm in arms:
        nodes["select", arm].run(context)
    for name, selector in CLASS_SELECTORS.items():
        for label, images in (("real", nodes["encode", "train"]), ("generated", nodes["generate", "pretrained"])):
            embed = nodes["embed", "train" if label == "real" else "pretrained"].artifact(tiny_run.storage)
            units, store = by_class(images.units)[1], images.store(tiny_run.storage)
            pixels = torch.cat([store.read(unit) for unit in units])
            shards = [load(embed.read(f"{unit}.safetensors")) for unit in units]
            shown = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
            count = len(pixels) if label == "real" else 6
            real = nodes["embed", "train"].artifact(tiny_run.storage)
            references = torch.cat(
                [load(real.read(f"{u}.safetensors"))["features"] for u in by_class(nodes["embed", "train"].units)[1]]
            )
            for per in ("image", "group"):
                rng = generator_for(plan.config.seed, "random-subset", 1)
                it = ClassImages(
                    count, rng, shown["features"][:count].double(), references.double(), shown["log_probability"][:count],
                    shown["recognised"][:count],
                )  # fmt: skip
                expected = pixels[selector.choose(it, 2, per).sort().values]
                mine = read_set(nodes["select", f"{name}-{per}-{label}"].artifact(tiny_run.storage))[0][2:4]
                assert torch.equal(mine, expected), (name, per, label)


def test_a_selector_that_is_killed_reads_what_is_committed_when_it_comes_back(tiny_run: Run):
    (stage,) = [s for s in tiny_run.plan.stages if (s.name, s.label) == ("select", "ims3")]
    expected = (stage.manifest(tiny_run.storage) or {})["table"]
    context: Any = Context(tiny_run.config, tiny_run.storage, tiny_run.plan.classes, None)
    key = stage.key(tiny_run.storage)
    actor = start_selector(key, select.parts_of(context, stage), stage.selector)
    assert ray.get(actor.missing.remote()) == []
    ray.kill(actor, no_restart=False)
    assert ray.get(ray.get_actor(actor_name(key, tiny_run.storage), NAMESPACE).progress.remote()) == {
        "candidates": (6, 6),
        "references": (9, 9),
    }
    chosen, table = select.choose_together(context, stage)
    assert table["groups"] == expected["groups"]
    assert [indices[0] // 2 for indices in chosen] == expected["groups"]
