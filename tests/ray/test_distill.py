"""A whole run on real Ray: what each stage left, and what the next one made of it."""

from __future__ import annotations

import json
import math
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load

from ims3_ray import RunConfig, UserError, distill
from ims3_ray.cluster.joining import most_at_once
from ims3_ray.commands import distill as command
from ims3_ray.config import TrainerConfig, canonical
from ims3_ray.data.sources import open_source
from ims3_ray.data.sources.parquet import class_names_of
from ims3_ray.data.transforms import to_signed
from ims3_ray.diffusion.instability import log_instability
from ims3_ray.diffusion.inversion import invert
from ims3_ray.diffusion.prediction import guided
from ims3_ray.diffusion.samplers.base import sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.engine.pool import produce
from ims3_ray.engine.sets import read_set
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.io.storage import Storage
from ims3_ray.models.checkpoints import pack
from ims3_ray.models.difffit import merge_adapter
from ims3_ray.models.encoder import Encoder, encoder_config, load_encoder
from ims3_ray.models.generator import load_generator
from ims3_ray.plan import make_plan
from ims3_ray.seeds import generator_for
from ims3_ray.selection import centroid, select_subgroups
from ims3_ray.stages.tuning import groups_at_once
from ims3_ray.tracking import Tracker
from tests.conftest import CLASSES, tiny_values
from tests.ray.conftest import Run

K, G = 2, 3


def stage(run: Run, kind: str, label: str) -> Stage:
    (found,) = [s for s in run.plan.stages if (s.name, s.label) == (kind, label)]
    return found


def tensors(run: Run, kind: str, label: str) -> torch.Tensor:
    """The images of all units of a pool, in order of class and index."""
    node = stage(run, kind, label)
    return torch.cat([node.store(run.storage).read(unit) for unit in node.units])


def chosen(run: Run, arm: str) -> dict[str, torch.Tensor]:
    pixels, labels = read_set(stage(run, "select", arm).artifact(run.storage))[:2]
    return {"pixels": pixels, "labels": labels}


def student_units(run: Run, results: dict[str, Any], title: str) -> list[dict[str, Any]]:
    """What the students of a set have left, in order of their seeds."""
    (key,) = [row["key"] for row in results["stages"] if row["title"] == f"evaluate ({title}; hard/convnet-3)"]
    manifest = json.loads((Path(run.config.storage) / "artifacts" / "evaluate" / key / "manifest.json").read_text())
    return [manifest["units"][f"seed-{seed}"] for seed in run.config.evaluation.seeds]


def test_results_have_every_arm_with_seeds_mean_and_std(tiny_run: Run):
    results = json.loads((tiny_run.folder / "results.json").read_text())
    assert list(results["sets"]) == ["random_real", "dit", "dit_s3", "ims3"]
    for found in results["sets"].values():
        (row,) = found["rows"].values()
        last = row["last"]
        assert len(last["seeds"]) == 2
        assert last["mean"] == pytest.approx(np.mean(last["seeds"]))
        assert last["std"] == pytest.approx(np.std(last["seeds"], ddof=1))
        assert last["sem"] == pytest.approx(last["std"] / math.sqrt(2))
        units = student_units(tiny_run, results, found["title"])
        assert row["best"]["seeds"] == [max(check["test"] for check in unit["curve"]) for unit in units]
        chosen = [max(unit["curve"], key=lambda check: check["val"]) for unit in units]
        assert row["val"]["seeds"] == [check["test"] for check in chosen]
        assert np.mean(row["per_class"]) == pytest.approx(last["mean"], abs=0.01)
        assert [check["epoch"] for check in row["curve"]] == [2, 4]
    assert tiny_run.result.accuracy("ims3") == results["sets"]["ims3"]["rows"]["hard/convnet-3"]["last"]["mean"]


def test_confusion_counts_every_test_image_of_every_student(tiny_run: Run):
    tables = load((tiny_run.folder / "confusion.safetensors").read_bytes())
    assert set(tables) == {f"{arm}/hard/convnet-3" for arm in ("random_real", "dit", "dit_s3", "ims3")}
    for name, table in tables.items():
        assert table.sum(dim=1).tolist() == [20, 20, 20]  # ten images a class, two students
        share = 100 * table.trace().item() / table.sum().item()
        assert share == pytest.approx(tiny_run.result.accuracy(name.partition("/")[0]))


def test_candidates_are_what_the_sampler_draws_one_by_one(tiny_run: Run):
    images = tensors(tiny_run, "generate", "pretrained").unflatten(0, (len(CLASSES), -1))
    model = load_generator(Path(tiny_run.config.generator))
    for label, index in [(0, 0), (1, 5), (2, 3)]:
        predict = guided(model, torch.tensor([label]), len(CLASSES), 2.0)
        rng = generator_for(tiny_run.config.seed, "image", label, index)
        expected = sample(predict, (1, 8, 8), [rng], NoiseSchedule(), 3, clip=True)[0]
        off = (images[label, index].float() - (expected + 1) * 127.5).abs().max()
        assert off <= 1  # rounding: a batch of one need not give the same last bits as a batch of four


def test_s3_chooses_what_eq_10_says_of_features_computed_directly(tiny_run: Run):
    phi = load_encoder(Path(tiny_run.config.encoder))
    source = open_source(tiny_run.config.data.path, "train")

    def features(pixels: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return phi(pixels.float() / 127.5 - 1)

    references, candidates = [], []
    images = tensors(tiny_run, "generate", "fine-tuned").unflatten(0, (len(CLASSES), -1))
    for label in range(len(CLASSES)):
        real = [np.asarray(source.image(int(i)))[None] for i in np.flatnonzero(source.labels == label)]
        references.append(centroid(features(torch.from_numpy(np.stack(real)))))
        groups = images[label, : G * K].unflatten(0, (G, K))
        candidates.append(torch.stack([centroid(features(group)) for group in groups]))
    expected = select_subgroups(torch.stack(candidates), torch.stack(references), alpha=0.4, beta=0.9)
    table = (stage(tiny_run, "select", "ims3").manifest(tiny_run.storage) or {})["table"]
    torch.testing.assert_close(torch.tensor(table["score"], dtype=torch.float64), expected.score_CG, rtol=1e-3, atol=1e-3)
    assert table["groups"] == expected.groups.tolist()
    for label, group in enumerate(table["groups"]):
        mine = chosen(tiny_run, "ims3")["pixels"][label * K : (label + 1) * K]
        assert torch.equal(mine, images[label, group * K : (group + 1) * K])


def test_the_arm_without_selection_takes_the_first_k(tiny_run: Run):
    images = tensors(tiny_run, "generate", "pretrained").unflatten(0, (len(CLASSES), -1))
    assert torch.equal(chosen(tiny_run, "dit")["pixels"], images[:, :K].flatten(0, 1))


def test_random_real_images_are_distinct_training_images_of_their_class(tiny_run: Run):
    source = open_source(tiny_run.config.data.path, "train")
    picked = chosen(tiny_run, "random_real")
    for label in range(len(CLASSES)):
        real = {np.asarray(source.image(int(i))).tobytes() for i in np.flatnonzero(source.labels == label)}
        mine = {image.numpy().tobytes() for image in picked["pixels"][picked["labels"] == label]}
        assert len(mine) == K
        assert mine <= real


def test_fine_tuning_trained_the_adapter_with_both_losses(tiny_run: Run):
    artifact = stage(tiny_run, "finetune", "").artifact(tiny_run.storage)
    adapter, losses = load(artifact.read("adapter-0.safetensors")), json.loads(artifact.read("losses-0.json"))
    weight = tiny_run.config.finetune.objectives.inversion_matching.weight
    assert [row["step"] for row in losses] == [1, 2, 3, 4]
    for row in losses:
        assert row["loss_inversion_matching"] > 0
        assert row["grad_norm"] > 0
        assert row["loss"] == pytest.approx(row["loss_diffusion"] + weight * row["loss_inversion_matching"], rel=1e-4)
    assert any("gamma" in name for name in adapter)
    start = load_generator(Path(tiny_run.config.generator)).state_dict()
    moved = [name for name, value in adapter.items() if name in start and not torch.equal(value, start[name])]
    assert moved
    assert not torch.equal(tensors(tiny_run, "generate", "pretrained"), tensors(tiny_run, "generate", "fine-tuned"))


def test_the_instability_is_eq_12_at_noise_inverted_from_real_images(tiny_run: Run):
    found = json.loads(stage(tiny_run, "instability", "").artifact(tiny_run.storage).read("instability.json"))
    assert len(found["before"]) == len(found["after"]) == 4
    pixels = load(stage(tiny_run, "encode", "train").artifact(tiny_run.storage).read("c0002-u00000.safetensors"))["pixels"]
    rng = generator_for(tiny_run.config.seed, "instability", 2)
    z0 = to_signed(pixels[torch.randperm(len(pixels), generator=rng)[:1]])
    adapter = load(stage(tiny_run, "finetune", "").artifact(tiny_run.storage).read("adapter-0.safetensors"))
    for name in ("before", "after"):
        model = load_generator(Path(tiny_run.config.generator))
        if name == "after":
            merge_adapter(model, adapter)
        predict = guided(model, torch.tensor([2]), 3, 1.0)
        schedule = NoiseSchedule()
        noise = invert(predict, z0, schedule.respaced(3)[-1:], schedule, 3, 0)
        exact = log_instability(predict, noise, schedule, 3, exact=True).item()
        assert found[name][3] == pytest.approx(exact, abs=0.05)  # an estimate from a few Lanczos steps
    result = tiny_run.result.results["instability"]
    change = sum(after - before for before, after in zip(found["before"], found["after"], strict=True)) / 4
    assert result["change"]["coefficient"] == pytest.approx(math.exp(change))
    assert change != 0
    assert "Instability of the generator" in (tiny_run.folder / "report.html").read_text()


def test_the_distilled_set_is_parquet_in_the_hub_layout_and_an_image_folder(tiny_run: Run):
    distilled = tiny_run.folder / "distilled"
    (file,) = (distilled / "data").glob("*.parquet")
    table = pq.read_table(file)
    assert class_names_of(table.schema.metadata) == CLASSES
    assert np.bincount(table["label"].to_numpy()).tolist() == [K] * len(CLASSES)
    again = open_source(str(distilled), "train")
    expected = chosen(tiny_run, "ims3")["pixels"]
    for index, row in enumerate(table["image"].to_pylist()):
        assert np.array_equal(np.asarray(again.image(index)), expected[index, 0].numpy())
        assert np.array_equal(np.asarray(Image.open(distilled / "images" / row["path"])), expected[index, 0].numpy())
    assert {p.name: len(list(p.iterdir())) for p in (distilled / "images").iterdir()} == dict.fromkeys(CLASSES, K)
    assert "tags:" in (distilled / "README.md").read_text()


def test_the_report_is_one_file_that_marks_the_chosen_subgroups(tiny_run: Run):
    html = (tiny_run.folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", html)
    assert html.count('class="chosen"') == 2 * len(CLASSES)
    assert html.count("data:image/png;base64,") == 4
    for text in (
        *CLASSES, "Random real", "DiT + S3", "fine-tune", "Every image that was read could be decoded",
        "Sampling: ddim, 3 steps", "references of all real images a class", "better by more than 0.0000",
    ):  # fmt: skip
        assert text in html


def test_mlflow_has_config_losses_terms_rates_children_and_files(tiny_run: Run, tmp_path: Path):
    client = MlflowClient(f"sqlite:///{tiny_run.folder}/mlflow.db")
    run_id = tiny_run.result.results["mlflow"]["run"]
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["selection.images_per_class"] == str(K)
    losses = client.get_metric_history(run_id, "loss_inversion_matching")
    assert sorted(m.step for m in losses) == [1, 2, 3, 4]
    assert {"seconds/generate_fine_tuned", "images_per_s/generate_fine_tuned", "s3/ims3/objective"} <= run.data.metrics.keys()
    (accuracy,) = client.get_metric_history(run_id, "accuracy/hard_convnet-3/ims3")
    assert (accuracy.step, accuracy.value) == (K, pytest.approx(tiny_run.result.accuracy("ims3")))
    children = client.search_runs([run.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'")
    assert {c.info.run_name for c in children} == {"Random real", "DiT", "DiT and S3", "IMS3"}
    for child in children:
        mean = tiny_run.result.accuracy(child.data.params["arm"])
        assert child.data.metrics["hard/convnet-3/last_mean"] == pytest.approx(mean)
        curve = client.get_metric_history(child.info.run_id, "hard/convnet-3/test/seed-0")
        assert sorted(m.step for m in curve) == [2, 4]
    files = {file.path for file in client.list_artifacts(run_id)}
    assert {"report.html", "contact_sheet_ims3.png", "distilled", "s3"} <= files
    kept = Path(client.download_artifacts(run_id, "distilled", str(tmp_path)))
    assert len(open_source(str(kept), "train").labels) == K * len(CLASSES)
    terms = json.loads(Path(client.download_artifacts(run_id, "s3/ims3.json", str(tmp_path))).read_text())
    assert terms["columns"] == ["class", "subgroup", "proximity", "repulsion", "score"]
    assert [row[0] for row in terms["data"]] == list(CLASSES)
    exported = tiny_run.result.results["sets"][tiny_run.result.results["exported"]["arm"]]
    told = {one.tags[0].value: one.dataset for one in run.inputs.dataset_inputs}
    assert (told["distilled"].name, told["distilled"].digest) == ("tiny distilled", exported["content"])
    assert json.loads(told["distilled"].profile) == {"num_rows": K * len(CLASSES), "num_classes": len(CLASSES)}
    assert {"training", "evaluation"} <= told.keys()
    kind = client.get_experiment(run.info.experiment_id).tags["mlflow.experimentKind"]
    assert kind == "custom_model_development"
    assert run.info.artifact_uri.startswith(f"file://{tiny_run.folder}/mlflow/")


def test_a_finished_run_is_not_computed_again(tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a finished run started again")

    monkeypatch.setattr(command, "_run", refuse)
    assert distill(tiny_run.config).results == tiny_run.result.results


def test_another_arm_shares_every_stage_that_it_can(tiny_run: Run):
    """α and β changed: only selection, evaluation and export of what depends on them is new."""
    other = tiny_run.config.model_dump() | {"name": "other"}
    other["selection"] |= {"alpha": 1.0, "beta": 0.0}
    plan = make_plan(RunConfig.model_validate(other))
    missing = {s.name for s in plan.stages if s.missing(tiny_run.storage)}
    assert missing <= {"select", "evaluate", "export"}
    assert "select" in missing


def test_another_phi_embeds_the_same_pool_again_and_keeps_what_it_made_when_interrupted(tiny_run: Run, tmp_path: Path):
    encoder = Encoder(encoder_config(Path(tiny_run.config.encoder)))
    weights = tmp_path / "other-phi.safetensors"
    weights.write_bytes(pack(encoder, canonical(encoder.config), "encoder"))
    other = tiny_run.config.model_dump() | {"name": "other-phi", "encoder": str(weights)}
    config = RunConfig.model_validate(other)
    plan = make_plan(config)
    stages = {(s.name, s.label): s for s in plan.stages}
    candidates, embed = stages["generate", "pretrained"], stages["embed", "pretrained"]
    assert not candidates.missing(tiny_run.storage)
    assert embed.missing(tiny_run.storage) == list(embed.units)
    context = Context(config, tiny_run.storage, plan.classes, Tracker(config, tiny_run.storage))
    produce(context, {candidates: [embed]})
    unit = embed.units[0]
    with torch.inference_mode():
        pixels = candidates.store(tiny_run.storage).read(unit)
        expected = encoder.eval()(pixels.float() / 127.5 - 1)
    features = load(embed.artifact(tiny_run.storage).read(f"{unit}.safetensors"))["features"]
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)

    before = embed.manifest(tiny_run.storage) or {}
    folder = Path(tiny_run.storage.address(embed.artifact(tiny_run.storage).folder))
    (folder / "manifest.json").unlink()  # as if the pass had been killed with one unit to go
    for file in (folder / "shards").glob(f"{unit}*"):
        file.unlink()
    kept = {file: file.stat().st_mtime_ns for file in (folder / "shards").iterdir()}
    assert kept
    produce(context, {candidates: [embed]})
    after = embed.manifest(tiny_run.storage) or {}
    shards = [{name: entry["sha256"] for name, entry in found["units"].items()} for found in (before, after)]
    assert shards[0] == shards[1]
    assert {file: file.stat().st_mtime_ns for file in kept} == kept


def test_truncated_images_are_counted_and_named_and_the_run_goes_on(tiny_world: Path, tmp_path: Path, cluster: None):
    data = tmp_path / "photos"
    write_folders(data)
    broken = data / "train" / "right" / "00001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    result = distill(RunConfig.model_validate(real_only(tiny_world, data, tmp_path / "runs")))
    (named,) = result.results["skipped_images"]
    assert named.startswith("right/00001.png: ")
    assert "right/00001.png" in Path(result.report).read_text()


def test_a_class_left_with_too_few_whole_images_is_an_error(tiny_world: Path, tmp_path: Path, cluster: None):
    data = tmp_path / "photos"
    write_folders(data)
    for file in sorted((data / "train" / "right").iterdir())[:-1]:
        file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match=r"class 'right' has 1 train images that can be decoded \(3 cannot, as .*: "):
        distill(RunConfig.model_validate(real_only(tiny_world, data, tmp_path / "runs")))
    assert not Storage.at(str(tmp_path / "runs")).exists("tiny/results.json")


def write_folders(data: Path) -> None:
    """Four training and two test images of each class, one folder per class."""
    rng = np.random.default_rng(3)
    for split, count in (("train", 4), ("test", 2)):
        for name in CLASSES:
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8)).save(data / split / name / f"{i:05d}.png")


def real_only(world: Path, data: Path, storage: Path) -> dict[str, object]:
    arms = {"real": {"title": "Random real", "images": "real", "select": "random"}}
    return tiny_values(world, storage, arms=arms, export="real", data={"path": str(data)})


def test_workers_keep_freed_memory_for_their_next_tensors(cluster: None):
    """By default glibc gives the memory of a large tensor back to the kernel, and the next one costs a page fault for every 4
    kB. The first tensors differ in where they lie, so the last ones count."""

    def faults_of_tensors(megabytes: int) -> list[int]:
        found = []
        for _ in range(20):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(megabytes * 2**18)
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return found

    faults = ray.get(ray.remote(num_cpus=0)(faults_of_tensors).remote(64))
    assert max(faults[-5:]) < 64 * 2**20 / 4096 / 10


def test_a_small_machine_trains_no_more_at_once_than_it_has_cores(tiny_run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert ray.cluster_resources()["CPU"] == 4  # of a cluster that the tests have started
    cluster = tiny_run.config.cluster
    assert [most_at_once(cluster, cpus) for cpus in (0.5, 1, 2, 3, 8)] == [4, 2, 1, 1, 1]
    trainers = [TrainerConfig(num_workers=workers, threads_per_worker=threads) for workers, threads in ((1, 1), (1, 2), (2, 1))]
    assert [groups_at_once(trainer, cluster) for trainer in trainers] == [2, 1, 1]
    assert most_at_once(cluster.model_copy(update={"address": "auto"}), 1) is None
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    assert most_at_once(cluster, 1) is None
