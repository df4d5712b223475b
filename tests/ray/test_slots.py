"""The four slots of an arm: sets that were given, made from nothing, labelled softly; and what no slot asks for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import normalize

from ims3_ray.commands.distill import distill, evaluate
from ims3_ray.component import Section
from ims3_ray.config import EvaluateConfig, RunConfig, canonical
from ims3_ray.data.transforms import to_signed
from ims3_ray.engine.sets import RealSplit, read_set
from ims3_ray.errors import IncompletePool, UserError
from ims3_ray.io.parquet import encode_png, image_table, parquet_bytes
from ims3_ray.io.storage import Storage
from ims3_ray.models.encoder import load_encoder
from ims3_ray.plan import make_evaluation, make_plan
from ims3_ray.saving import Save
from ims3_ray.seeds import generator_for
from ims3_ray.selection import select_subgroups
from ims3_ray.stages.generate import Generate
from ims3_ray.synthesis.base import Costs, Given, Part, Synthesis
from tests.conftest import CLASSES, tiny_values
from tests.ray.conftest import Run, copy_of

K = 2


class Rungs(Synthesis):
    """Images of one number and all classes are made together: each is as bright as its class and number say."""

    name = "rungs"

    class Config(Section):
        marks: str = ""
        """Folder in which each part leaves a mark, and fails the first time."""

    @classmethod
    def parts(cls, config: Config, num_classes: int, k: int) -> list[Part]:
        return [[(position, number) for position in range(num_classes)] for number in range(k)]

    @classmethod
    def flops(cls, config: Config, costs: Costs) -> float:
        return 7.0

    def make(self, given: Given, state: bytes | None, save: Save) -> Mapping[str, Tensor]:
        assert given.classes.tolist() == list(range(given.num_classes)), "a part has an image of every class"
        if self.config.marks and state is None:
            save(b"begun")
            Path(self.config.marks, f"{int(given.indices[0])}").touch()
            raise RuntimeError("as if interrupted")
        values = 50 * given.classes + 7 * given.indices
        pixels = values.to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
        logits = torch.nn.functional.one_hot(given.classes, given.num_classes) * 4.0
        return {"pixels": pixels.contiguous(), "logits": logits, "weights": 1.0 + given.indices}


def values_of(run: Run, folder: Path, **changes: Any) -> dict[str, Any]:
    """A config of the tiny world in a storage of its own, with these arms alone."""
    world = Path(run.config.generator).parent
    values = tiny_values(world, folder, instability={"images": 0}, **changes)
    values["selection"] = {**values["selection"], "images_per_class": K}
    return values


def test_s3_chooses_among_real_images_and_full_takes_all_of_them(tiny_run: Run, tmp_path: Path):
    """The best and the worst of G random subgroups of the real images, against Eq. 10 by hand; all images of the split."""
    config = copy_of(tiny_run, tmp_path)
    s3 = {"title": "Real + S3", "images": "real", "select": "s3"}
    full = {"title": "Full", "images": "real", "select": "all"}
    worst = {**s3, "title": "worst", "overrides": {"selection": {"choose": "worst"}}}
    changes = {"name": "real", "export": "best", "arms": {"best": s3, "worst": worst, "full": full}, "stages": {"coverage": {}}}
    config = RunConfig.model_validate({**canonical(config), **changes})
    result, plan, storage = distill(config), make_plan(config), Storage.at(config.storage)
    (encode,) = [stage for stage in plan.stages if (stage.name, stage.label) == ("encode", "train")]
    real = RealSplit.of(encode, storage).read()[0].unflatten(0, (len(CLASSES), -1))
    phi, per_class = load_encoder(Path(config.encoder)), real.shape[1]
    with torch.inference_mode():
        features = normalize(phi(to_signed(real.flatten(0, 1))).double(), dim=1).unflatten(0, (len(CLASSES), per_class))
    groups = []
    for label in range(len(CLASSES)):
        order = torch.randperm(per_class, generator=generator_for(config.seed, "subgroups", label))
        groups.append(order[: 3 * K].reshape(3, K))
    centroids = normalize(torch.stack([features[c][groups[c]].mean(dim=1) for c in range(len(CLASSES))]), dim=-1)
    score = select_subgroups(centroids, features.mean(dim=1), alpha=0.4, beta=0.9).score_CG
    for arm, wanted in (("best", score.argmin(dim=1)), ("worst", score.argmax(dim=1))):
        chosen = read_set(plan.sets[arm].images.artifact(storage)).pixels.unflatten(0, (len(CLASSES), K))
        for label, group in enumerate(wanted.tolist()):
            assert torch.equal(chosen[label], real[label][groups[label][group].sort().values])
    whole = read_set(plan.sets["full"].images.artifact(storage))
    assert torch.equal(whole.pixels, real.flatten(0, 1))
    assert result.results["sets"]["full"]["images"] == len(whole.pixels)
    assert set(result.results["sets"]["full"]["rows"]["hard/convnet-3"]) >= {"last", "best"}
    assert set(result.results["coverage"]) == {"best", "worst"}, "the whole split covers itself"
    assert result.results["exported"]["arm"] != "full"
    with pytest.raises(UserError, match=r"select: s3 chooses among selection.groups·images_per_class = 32 real images"):
        make_plan(config.model_copy(update={"selection": config.selection.model_copy(update={"groups": 16})}))


FROM_NOTHING = {"title": "Rungs", "images": "none", "synthesise": "rungs"}


def test_a_method_that_couples_classes_makes_a_set_from_nothing_that_keeps_labels_and_weights(tiny_run: Run, tmp_path: Path):
    stored = {"width": 8, "epochs": 2, "validations": 1}
    protocols = {"hard": stored, "stored": {**stored, "labels": "stored"}}
    values = values_of(tiny_run, tmp_path, arms={"rungs": FROM_NOTHING}, export="rungs", name="none")
    values["evaluation"] = {**values["evaluation"], "protocols": protocols}
    config = RunConfig.model_validate(values)
    plan, storage = make_plan(config), Storage.at(config.storage)
    result = distill(config)
    assert not any(stage.weights for stage in plan.stages), "nothing asked for a generator or an encoder"
    found = read_set(plan.sets["rungs"].images.artifact(storage))
    assert found.pixels[:, 0, 0, 0].tolist() == [0, 7, 50, 57, 100, 107]
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.weights.tolist() == [1.0, 2.0] * 3
    assert torch.equal(found.logits.argmax(dim=1), found.labels)
    assert set(result.results["sets"]["rungs"]["rows"]) == {"hard/convnet-3", "stored/convnet-3"}

    # Exported and scored elsewhere it is the same set, labels and weights included.
    folder = tmp_path / "none" / "distilled"
    table = pq.read_table(folder / "data" / "train-00000-of-00001.parquet")
    assert table.column_names == ["image", "label", "logits", "weight"]
    shared = {key: values[key] for key in ("storage", "data", "actors", "evaluation")}
    scored = evaluate(EvaluateConfig.model_validate({**shared, "name": "again", "sets": {"mine": str(folder)}}))
    assert scored.results["sets"]["mine"]["content"] == result.results["sets"]["rungs"]["content"]
    assert scored.results["sets"]["mine"]["rows"] == result.results["sets"]["rungs"]["rows"]


def attempt(config: RunConfig) -> str:
    """What a run fails with; empty if it does not."""
    try:
        distill(config)
    except IncompletePool as error:
        return str(error)
    return ""


def test_a_part_that_was_interrupted_goes_on_from_what_it_saved(tiny_run: Run, tmp_path: Path):
    (tmp_path / "marks").mkdir()
    settings = {"rungs": {"marks": str(tmp_path / "marks")}}
    config = RunConfig.model_validate(
        values_of(tiny_run, tmp_path, arms={"rungs": FROM_NOTHING}, export=None, name="again", synthesis=settings)
    )
    errors = [attempt(config) for _ in range(3)]
    assert "RuntimeError: as if interrupted; run the same command again to continue" in errors[0]
    assert errors[-1] == ""
    assert {file.name for file in (tmp_path / "marks").iterdir()} == {"0", "1"}
    (images,) = {scored.images for scored in make_plan(config).sets.values()}
    shards = images.artifact(Storage.at(config.storage)).shards()
    assert not [name for name in shards if name.endswith(".state")], "what is finished keeps no state"


def test_real_images_need_neither_generator_nor_encoder(tmp_path: Path, cluster: None):
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 6)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (9, 11, 3), dtype=np.uint8) + np.uint8(100 * number)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    config = RunConfig.model_validate({
        "name": "mine", "storage": str(tmp_path / "runs"), "generator": "embedded:none", "encoder": "embedded:none",
        "data": {"path": str(tmp_path / "photos"), "size": 8, "channels": 3}, "selection": {"images_per_class": 3},
        "arms": {"random_real": {"title": "Random real", "images": "real", "select": "random"}}, "export": "random_real",
        "evaluation": {"protocols": {"hard": {"width": 8, "epochs": 8}}, "seeds": [0], "val_per_class": 2},
        "actors": {"count": 1},
    })  # fmt: skip
    result = distill(config)
    assert {row["stage"] for row in result.results["stages"]} == {"encode", "select", "held_out", "export", "evaluate"}
    assert len(list((tmp_path / "runs/mine/distilled/images").glob("*/*.png"))) == 2 * 3


def test_a_given_set_stands_beside_the_others_by_its_number_of_images(tiny_run: Run, tmp_path: Path):
    shutil.copytree(tiny_run.folder / "distilled" / "images", tmp_path / "sets" / f"of-{K}")
    arm = {"title": "Given", "images": "given", "path": str(tmp_path / "sets" / "of-{k}")}
    values = values_of(tiny_run, tmp_path / "runs", arms={"given": arm}, export="given", name="given")
    result = distill(RunConfig.model_validate(values))
    mine = json.loads((tiny_run.folder / "results.json").read_text())["sets"]["ims3"]
    assert result.results["sets"]["given"]["content"] == mine["content"]
    assert result.results["sets"]["given"]["rows"] == mine["rows"], "the same images teach the same"

    values["selection"] = {**values["selection"], "images_per_class": 1}
    values["arms"]["given"]["path"] = str(tmp_path / "sets" / f"of-{K}")
    with pytest.raises(
        UserError, match=rf"has {K} images of class '{CLASSES[0]}', where 1 are compared; name a set of 1 a class"
    ):
        make_plan(RunConfig.model_validate(values))


def test_soft_labels_are_the_teachers_and_students_learn_from_them(tiny_run: Run, tmp_path: Path):
    arm = {"title": "Soft", "images": "real", "select": "random", "labels": "soft"}
    values = values_of(tiny_run, tmp_path, arms={"soft": arm}, export="soft", name="soft")
    values["evaluation"] = {
        **values["evaluation"], "teacher": {"weights": tiny_run.config.encoder},
        "protocols": {"stored": {"labels": "stored", "width": 8, "epochs": 3, "validations": 1}},
    }  # fmt: skip
    config = RunConfig.model_validate(values)
    result, plan = distill(config), make_plan(config)
    found = read_set(plan.sets["soft"].images.artifact(Storage.at(config.storage)))
    with torch.no_grad():
        expected = load_encoder(Path(tiny_run.config.encoder)).logits(2 * (found.pixels.float() / 255) - 1)
    torch.testing.assert_close(found.logits.float(), expected, atol=0.01, rtol=0.01)
    (row,) = result.results["sets"]["soft"]["rows"].values()
    assert row["curve"][-1]["loss"] < 0.5, "a divergence at T = 20, no cross entropy"

    values["arms"]["soft"].pop("labels")
    values["name"] = "hard"
    with pytest.raises(UserError, match=r"protocols.stored takes stored soft labels, which the set of 'Soft' has not"):
        make_plan(RunConfig.model_validate(values))


def test_labels_of_batches_are_made_once_for_all_students(tiny_run: Run, tmp_path: Path):
    arm = {"title": "Real", "images": "real", "select": "random"}
    values = values_of(tiny_run, tmp_path, arms={"real": arm}, export=None, name="batches")
    fkd = {"labels": "stored_batches", "width": 8, "epochs": 12, "validations": 1, "cutmix": True}
    protocols = {"fkd": {**fkd, "students": ["convnet-3", "convnet-2"]}, "faster": {**fkd, "lr": 0.02}}
    values["evaluation"] = {
        **values["evaluation"], "teacher": {"weights": tiny_run.config.encoder}, "protocols": protocols, "seeds": [0, 1],
    }  # fmt: skip
    config = RunConfig.model_validate(values)
    plan, storage = make_plan(config), Storage.at(config.storage)
    result = distill(config)
    (labelled,) = [stage for stage in plan.stages if stage.name == "label_batches"]
    assert labelled.units == ("epochs-00000", "epochs-00010")
    logits = load(labelled.artifact(storage).read("epochs-00010.safetensors"))["logits"]
    assert (logits.shape, logits.dtype) == ((2, 3 * K, 3), torch.float16)
    rows = result.results["sets"]["real"]["rows"]
    assert set(rows) == {"fkd/convnet-3", "fkd/convnet-2", "faster/convnet-3"}
    assert all(row["curve"][-1]["loss"] < 0.5 for row in rows.values()), "divergences at T = 20, no cross entropies"
    artifact = labelled.artifact(storage)
    made = {unit: artifact.read(f"{unit}.safetensors") for unit in labelled.units}
    kept = Path(storage.address(f"{artifact.folder}/shards/epochs-00000.safetensors"))
    changed = kept.stat().st_mtime_ns
    artifact.withdraw()  # as after an interruption in the second unit
    for ending in ("json", "safetensors"):
        artifact.forget(f"epochs-00010.{ending}")
    values["evaluation"] = {**values["evaluation"], "seeds": [0, 1, 2]}
    distill(RunConfig.model_validate({**values, "name": "more-students"}))
    assert {unit: labelled.artifact(Storage.at(config.storage)).read(f"{unit}.safetensors") for unit in made} == made
    assert kept.stat().st_mtime_ns == changed


def test_a_given_set_with_classes_of_other_sizes_is_planned_by_its_largest(tiny_run: Run, tmp_path: Path):
    shutil.copytree(tiny_run.folder / "distilled" / "images", tmp_path / "set")
    (removed, *_) = sorted((tmp_path / "set" / CLASSES[0]).iterdir())
    removed.unlink()
    values = values_of(tiny_run, tmp_path / "runs")
    fkd = {"labels": "stored_batches", "width": 8, "epochs": {1: 2, 2: 11}, "batch_size": {1: 2, 2: 4}, "validations": 1}
    shared = {key: values[key] for key in ("storage", "data", "actors")}
    evaluation = {"teacher": {"weights": tiny_run.config.encoder}, "protocols": {"fkd": fkd}, "seeds": [0], "val_per_class": 0}
    config = EvaluateConfig.model_validate(
        {**shared, "evaluation": evaluation, "name": "unequal", "sets": {"mine": str(tmp_path / "set")}}
    )
    (labelled,) = [stage for stage in make_evaluation(config).stages if stage.name == "label_batches"]
    assert len(labelled.units) == 2, "eleven epochs"
    (row,) = evaluate(config).results["sets"]["mine"]["rows"].values()
    assert row["curve"][-1]["epoch"] == 11


def test_an_arm_may_have_its_own_generator(tiny_run: Run, tmp_path: Path):
    other = shutil.copy(tiny_run.config.generator, tmp_path / "other.safetensors")
    arms = {
        "dit": {"title": "DiT", "images": "generated"},
        "other": {"title": "Other", "images": "generated", "overrides": {"generator": str(other)}},
    }
    plan = make_plan(RunConfig.model_validate(values_of(tiny_run, tmp_path / "runs", arms=arms, export=None)))
    # The copy is the same generator, so it is the same pool: a file is known by its content.
    assert len([stage for stage in plan.stages if isinstance(stage, Generate)]) == 1
    sets = {name: scored.images.key(Storage.at(str(tmp_path))) for name, scored in plan.sets.items()}
    assert sets["dit"] == sets["other"]


def test_soft_labels_of_a_set_with_its_classes_in_another_order_are_put_in_order(tiny_run: Run, tmp_path: Path):
    names, folder = CLASSES[::-1], tmp_path / "set"
    folder.mkdir()
    rows = [(encode_png(Image.new("L", (8, 8), 60 * label)), f"{label}.png", label) for label in range(3)]
    logits = np.eye(3, dtype=np.float32) * 5  # of the class itself, in the order of the file
    (folder / "train.parquet").write_bytes(parquet_bytes(image_table(rows, names, {"logits": logits})))
    values = values_of(tiny_run, tmp_path / "runs")
    shared = {key: values[key] for key in ("storage", "data", "actors", "evaluation")}
    config = EvaluateConfig.model_validate({**shared, "name": "given", "sets": {"mine": str(folder)}})
    evaluate(config)
    plan = make_evaluation(config)
    found = read_set(plan.sets["mine"].images.artifact(Storage.at(config.storage)))
    assert found.pixels[:, 0, 0, 0].tolist() == [120, 60, 0]
    assert found.logits.argmax(dim=1).tolist() == found.labels.tolist() == [0, 1, 2]
