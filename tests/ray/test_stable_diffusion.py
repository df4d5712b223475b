"""D4M and DDVLCP with a tiny pipeline of Stable Diffusion: whole runs, what they are told, and a killed worker."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ims3_ray import distill
from ims3_ray.config import RunConfig
from ims3_ray.data.captions import caption_of_clusters
from ims3_ray.diffusion.samplers.base import sample
from ims3_ray.diffusion.steering.modes import Clustering, find_modes
from ims3_ray.engine.images import Decoder
from ims3_ray.engine.sets import read_set
from ims3_ray.engine.stage import Stage
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.models.autoencoder import autoencoder_path
from ims3_ray.models.generator import generator_path, open_generator
from ims3_ray.plan import make_plan
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.stages.latents import read_latents
from tests.conftest import CLASSES, tiny_values
from tests.pipelines import write_pipeline
from tests.ray.conftest import Run
from tests.ray.test_kills import killing

pytestmark = pytest.mark.slow

K = 2
WORDS = ("a dark bar, wide", "a bright bar in the middle of noise", "noise " * 60)
"""Captions; the last one is longer than the 77 tokens that CLIP reads at once."""


def config_of(
    world: Path, pipeline: Path, storage: Path, arms: dict[str, Any], captions: Path | None = None, store: str = "png"
) -> RunConfig:  # fmt: skip
    sampling = {"sampler": "pndm", "steps": 4, "unit_size": 3, "cfg_scale": 3.0, "clip": False, "negative_prompt": "grey"}
    values = tiny_values(
        world, storage, arms=arms, instability={"images": 2, "steps": 2, "probes": 1}, export=None,
        finetune={"parameters": "lora", "rank": 2, "words": "captions" if captions else "class", "lr": 0.05},
        generator=str(pipeline), sampling=sampling, pool={"store": store},
        data={"captions": str(captions) if captions else None}, selection={"images_per_class": K, "groups": 2},
    )  # fmt: skip
    values["evaluation"] = {
        "protocols": {"hard": {"width": 4, "epochs": 1, "validations": 1}}, "seeds": [0], "val_per_class": 0,
    }  # fmt: skip
    return RunConfig.model_validate(values)


def arm(name: str, select: str = "first", **settings: Any) -> dict[str, Any]:
    prototypes = {"prototypes": {"strength": 0.75, **settings}}
    return {"title": name, "images": "generated", "select": select, "overrides": {"sampling": prototypes}}


ARMS = {
    "d4m": arm("D4M", minibatch=2),
    "d4m_s3": arm("D4M + S3", "s3", minibatch=2),
    "ddvlcp": arm("DDVLCP", outliers=0.1, words="captions"),
    "tuned": {**arm("DDVLCP, fine-tuned", outliers=0.1, words="captions"), "finetune": True},
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"), channels=1)


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A caption for each of the ninety images."""
    file = tmp_path_factory.mktemp("captions") / "metadata.jsonl"
    names = [f"train-images-idx3-ubyte[{index}]" for index in range(90)]
    rows = [{"file_name": name, "text": WORDS[index % 3]} for index, name in enumerate(names)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def run(tiny_world: Path, pipeline: Path, captions: Path, tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Run:
    config = config_of(tiny_world, pipeline, tmp_path_factory.mktemp("sd"), ARMS, captions, "latents")
    return Run(config, distill(config), make_plan(config), Storage.at(config.storage))


def stage_of(run: Run, arm: str, kind: str) -> Stage:
    """The stage of a kind that the set of an arm is made from."""
    waiting = [run.plan.sets[arm].images]
    while waiting:
        stage = waiting.pop()
        if stage.name == kind:
            return stage
        waiting += stage.inputs.values()
    raise AssertionError(f"{arm} has no stage {kind}")


def latents_of(run: Run, label: int) -> torch.Tensor:
    modes = stage_of(run, "d4m", "modes")
    units = [unit for unit in modes.inputs["images"].units if unit.startswith(f"c{label:04d}")]
    return read_latents(modes.inputs["latents"].artifact(run.storage), units)["mean"][:, 0].float()


def test_images_are_made_at_the_size_of_the_generator_and_scaled_to_that_of_the_data(run: Run):
    modes, generate = stage_of(run, "d4m", "modes"), stage_of(run, "d4m", "generate")
    assert (modes.inputs["images"].params["size"], generate.params["size"]) == (16, 8)
    assert latents_of(run, 0).shape == (30, 4, 8, 8)
    assert read_set(run.plan.sets["d4m"].images.artifact(run.storage)).pixels.shape == (3 * K, 1, 8, 8)
    assert generate.params["told"] == {"class_names": CLASSES, "prompts": CLASSES, "negative": "grey"}


def test_d4m_starts_at_its_prototypes_and_is_told_the_class(run: Run, pipeline: Path):
    found = find_modes(latents_of(run, 1), K, seed_for(0, "modes", 1), Clustering(minibatch=2))
    generator = open_generator(generator_path(str(pipeline))).told(CLASSES, CLASSES, "grey")
    rngs = [generator_for(0, "image", 1, index) for index in range(K)]
    drawn = sample(
        generator.predictor(generator.load(), 1, 1, 3.0), generator.latent, rngs, generator.schedule, 4, sampler="pndm",
        around=found.centres, strength=0.75,
    )  # fmt: skip
    expected = Decoder(autoencoder_path(str(pipeline)), "cpu", "fp32", 8)(drawn.half())
    pixels = read_set(run.plan.sets["d4m"].images.artifact(run.storage)).pixels.unflatten(0, (3, K))[1]
    assert (pixels.int() - expected.int()).abs().max() <= 1


def test_ddvlcp_is_told_the_caption_of_each_cluster(run: Run, pipeline: Path):
    found = find_modes(latents_of(run, 2), K, seed_for(0, "modes", 2), Clustering(outliers=0.1))
    captions = [WORDS[index % 3] for index in range(60, 90)]
    expected = caption_of_clusters(captions, found.clusters.tolist(), K, CLASSES[2], 0.7)
    shard = load(stage_of(run, "ddvlcp", "modes").artifact(run.storage).read("class-0002.safetensors"))
    assert json.loads(bytes(shard["captions"].tolist())) == expected
    torch.testing.assert_close(shard["modes"], found.centres)
    generator = open_generator(generator_path(str(pipeline))).told(CLASSES, CLASSES, "grey")
    network, decode = generator.load(), Decoder(autoencoder_path(str(pipeline)), "cpu", "fp32", 8)
    pixels = read_set(run.plan.sets["ddvlcp"].images.artifact(run.storage)).pixels.unflatten(0, (3, K))[2]
    for index, words in enumerate(expected):  # each alone, whatever the lengths of the others' captions
        drawn = sample(
            generator.predictor(network, 2, 1, 3.0, words=[words]), generator.latent, [generator_for(0, "image", 2, index)],
            generator.schedule, 4, sampler="pndm", around=found.centres[index : index + 1],
            strength=0.75,
        )  # fmt: skip
        assert (pixels[index].int() - decode(drawn.half())[0].int()).abs().max() <= 1


def test_fine_tuning_is_told_the_captions_and_changes_the_samples(run: Run):
    tuned = stage_of(run, "tuned", "finetune")
    assert set(tuned.params) >= {"told", "captions"}
    adapter = load(tuned.artifact(run.storage).read("adapter-0.safetensors"))
    assert {name.rpartition(".")[2] for name in adapter} == {"lora_up", "lora_down"}
    assert any(value.any() for name, value in adapter.items() if name.endswith("lora_up"))
    contents = {name: row["content"] for name, row in run.result.results["sets"].items()}
    assert contents["tuned"] != contents["ddvlcp"]
    assert stage_of(run, "tuned", "modes") is stage_of(run, "ddvlcp", "modes")
    assert run.result.results["instability"]["before"]["coefficient"] > 0


def test_s3_chooses_among_the_samples_of_d4m(run: Run):
    assert stage_of(run, "d4m_s3", "generate") is stage_of(run, "d4m", "generate")
    units = stage_of(run, "d4m", "generate").units
    assert len(units) == 3 * 2, "four candidates a class, in units of three"
    assert run.plan.sets["d4m_s3"].images.name == "select"


def test_a_killed_worker_changes_no_image_and_neither_does_the_form_in_which_they_are_stored(
    tiny_world: Path, pipeline: Path, run: Run, tmp_path: Path
):
    arms = {name: ARMS[name] for name in ("d4m", "d4m_s3")}
    for kind in ("encode", "embed", "latents", "modes"):
        shutil.copytree(Path(run.config.storage, "artifacts", kind), tmp_path / "artifacts" / kind)
    with killing("MapWorker", "artifacts/generate/*/shards/*", tmp_path):
        result = distill(config_of(tiny_world, pipeline, tmp_path, arms))
    for name in arms:
        assert result.results["sets"][name]["content"] == run.result.results["sets"][name]["content"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune": {"parameters": "difffit"}}, "has no parameters called difffit; set finetune.parameters=lora or all"),
        (
            {
                "arms": {"x": arm("x", words="captions")},
                "generator": "DIT",
                "sampling": {"sampler": "pndm", "steps": 4},
                "finetune": {},
            },
            "is for a generator that takes words",
        ),
        ({"arms": {"x": {**ARMS["d4m"], "synthesise": "cao2"}}}, "needs a generator that is told the label of a class"),
        ({"generator": "embedded:fashion-mnist-dit-coarse"}, "is told labels, not words; take sampling.negative_prompt out"),
        ({"arms": {"x": arm("x", words="captions")}}, "needs the captions of the training images"),
    ],
)
def test_what_the_generator_cannot_do_is_said_before_anything_is_made(
    tiny_world: Path, pipeline: Path, tmp_path: Path, changes: dict[str, Any], message: str
):
    arms = {"d4m": ARMS["d4m"], "tuned": {**ARMS["d4m"], "finetune": True}}
    values = config_of(tiny_world, pipeline, tmp_path, arms).model_dump(exclude_unset=True)
    if changes.get("generator") == "DIT":
        changes = {**changes, "generator": str(tiny_world / "dit.safetensors")}
    with pytest.raises(UserError, match=message):
        make_plan(RunConfig.model_validate({**values, **changes}))
    assert not any(tmp_path.iterdir())
