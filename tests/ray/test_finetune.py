"""Fine-tuning alone, on real Ray Train and DeepSpeed: how it is spread over workers changes rounding, nothing else."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
from safetensors import safe_open
from safetensors.torch import load

from ims3_ray import UserError
from ims3_ray.cluster.capacity import Request
from ims3_ray.config import FinetuneConfig
from ims3_ray.data.batches import batch_indices
from ims3_ray.engine import train
from ims3_ray.models.difffit import merge_adapter
from ims3_ray.models.generator import load_generator
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.stages import finetune_worker, latents
from ims3_ray.stages import tuning as running
from ims3_ray.stages.adapters import Adapters, GroupModels, Pretrained
from ims3_ray.stages.finetune import Finetune
from ims3_ray.stages.zero import ZeroEngine
from ims3_ray.training.finetuning import BuildEngine, Finetuner, TorchEngine
from tests.ray.conftest import prepare

EVERYTHING = {
    "inversion_matching": {"weight": 0.1, "n_steps": 2, "grad_steps": 1, "similarity": "l2"},
    "inversion_matching_released": {"weight": 0.1},
    "minimax": {"representativeness": 0.1, "diversity": 0.1, "memory": 4, "shared": True},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "ZeRO 0": {"zero_stage": 0},
    "ZeRO 1": {"zero_stage": 1},
    "ZeRO 2": {"zero_stage": 2},
    "ZeRO 3": {"zero_stage": 3},
    "in pieces": {"zero_stage": 1, "accumulate": 2},
    "recomputed": {"zero_stage": 1, "activation_checkpointing": True},
    "recomputed, ZeRO 3": {"zero_stage": 3, "activation_checkpointing": True},
    "compiled": {"zero_stage": 1, "compile": True},
    "everything trained": {"zero_stage": 1, "parameters": "all"},
    "everything trained, ZeRO 3": {"zero_stage": 3, "parameters": "all"},
    "bf16": {"zero_stage": 1, "precision": "bf16"},
    "bf16, ZeRO 3": {"zero_stage": 3, "precision": "bf16"},
}


def every_variant(arguments: dict[str, Any]) -> dict[str, Any]:
    """The loop once per variant in the same workers, whose start takes longer than any of them.

    Then ZeRO 0 and 3 stopped after two steps and continued; 0 (if ``arguments`` name a folder) from that of another number of
    workers too.
    """
    outcomes = {}
    alone = ray.train.get_context().get_world_size() == 1
    for name, changes in VARIANTS.items():
        if alone and name not in ("ZeRO 0", "everything trained"):
            continue  # one process is what the others are compared with
        outcomes[name] = finetune_worker.finetune_loop({**arguments, "config": {**arguments["config"], **changes}})
    for stage in (0, 3):
        with tempfile.TemporaryDirectory() as own:
            folder = arguments["checkpoints"] / f"{stage}-{ray.train.get_context().get_world_size()}"
            history = _steps(arguments, stage, range(2), None, folder)
            history += _steps(arguments, stage, range(2, 4), folder, Path(own))
        outcomes[f"ZeRO {stage} continued"] = {"history": history}
    if alone:
        outcomes["PyTorch alone"] = {"history": _steps(arguments, 0, range(4), None, None, TorchEngine)}
        outcomes["PyTorch alone, in pieces"] = {
            "history": _steps(arguments, 0, range(4), None, None, TorchEngine, accumulate=2)
        }
    if (other := arguments["checkpoints"] / "0-1").exists():
        outcomes["one worker's, continued"] = {"history": _steps(arguments, 0, range(2, 4), other, None)}
    return outcomes


def _steps(
    arguments: dict[str, Any], stage: int, steps: range, start: Path | None, end: Path | None,
    build_engine: BuildEngine = ZeroEngine, **settings: Any,
) -> list[dict[str, float]]:  # fmt: skip
    """The loop by hand: what is loaded from ``start`` runs ``steps`` and is saved in ``end``."""
    config = FinetuneConfig.model_validate({**arguments["config"], "zero_stage": stage, **settings})
    context = ray.train.get_context()
    images = latents.read_images(arguments["images"], None, arguments["classes"], config.flip)
    pretrained = arguments["pretrained"]
    generator = pretrained.open()
    tuner = Finetuner(
        pretrained.load(generator), generator, config, "cpu", context.get_world_rank(), context.get_world_size(), build_engine
    )
    if start is not None:
        tuner.load(start)
    order = seed_for(arguments["seed"], "finetune-order", 0) % 2**31
    batches = batch_indices(len(images.labels), config.batch_size, 0, 1, order, steps.start)
    rows = []
    for step in steps:
        batch = tuner.draw(images, next(batches), generator_for(arguments["seed"], "finetune", 0, step))
        rows.append({"step": step + 1.0, **tuner.step(batch)})
    if end is not None:
        end.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        tuner.save(end)
        torch.distributed.barrier()
    return rows


def change(adapter: bytes, world: Path) -> torch.Tensor:
    """All that fine-tuning changed, as one vector."""
    before, after = load_generator(world / "dit.safetensors").state_dict(), load(adapter)
    return torch.cat([(after[name] - before.get(name, torch.ones(()))).flatten() for name in sorted(after)])


@pytest.mark.slow
def test_however_it_is_spread_and_stored_the_same_is_learnt(tiny_world: Path, tmp_path: Path, encoded: Path):
    outcomes = {}
    for workers in (1, 2):
        context, stages = prepare(
            tiny_world,
            tmp_path / str(workers),
            encoded,
            finetune={"checkpoint_every": 100, "trainer": {"num_workers": workers}},
        )
        (group,) = running.groups_of(context, stages["finetune", ""])
        arguments = {**group.arguments, "checkpoints": tmp_path / "checkpoints"}
        place = str(tmp_path / str(workers))
        outcomes[workers] = train.fit(every_variant, arguments, context.config.finetune.trainer, "train", place)
    assert "one worker's, continued" in outcomes[2]
    assert "PyTorch alone" in outcomes[1]
    for outcome in outcomes.values():
        for name, found in outcome.items():
            exact = outcomes[1]["everything trained" if "everything" in name else "ZeRO 0"]
            loose = 20 if "bf16" in name else 1
            for row in found["history"]:
                wanted = exact["history"][int(row["step"]) - 1]
                assert row == pytest.approx(wanted, rel=1e-3 * loose, abs=1e-5 * loose), name
            if "adapter" in found:
                learnt, expected = change(found["adapter"], tiny_world), change(exact["adapter"], tiny_world)
                assert torch.cosine_similarity(learnt, expected, dim=0) > (0.97 if "bf16" in name else 0.9999), name
    everything = load(outcomes[1]["everything trained"]["adapter"])
    assert everything.keys() == load_generator(tiny_world / "dit.safetensors").state_dict().keys()
    assert outcomes[1]["everything trained"]["history"][3] != outcomes[1]["ZeRO 0"]["history"][3]


def test_all_objectives_run_together_and_add_up_on_as_many_workers_as_there_is_room_for(
    tiny_world: Path, tmp_path: Path, encoded: Path
):
    tuning = {"objectives": EVERYTHING, "zero_stage": 0, "batch_size": 7, "trainer": {"num_workers": 1, "max_workers": 2}}
    context, stages = prepare(tiny_world, tmp_path, encoded, finetune=tuning)
    Finetune.run_all(context, [stages["finetune", ""]])
    artifact = stages["finetune", ""].artifact(context.storage)
    rows = json.loads(artifact.read("losses-0.json"))
    assert all(value.isfinite().all() for value in load(artifact.read("adapter-0.safetensors")).values())
    for row in rows:
        weighted = row["loss_diffusion"] + 0.1 * sum(
            row[f"loss_{name}"]
            for name in ("inversion_matching", "inversion_matching_released", "representativeness", "diversity")
        )
        assert row["loss"] == pytest.approx(weighted, rel=1e-4)
    assert rows[0]["loss_diversity"] == 0
    assert rows[-1]["loss_diversity"] != 0


@pytest.mark.slow
def test_class_groups_are_tuned_apart_and_each_class_is_sampled_with_its_own(
    tiny_world: Path, tmp_path: Path, encoded: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[list[dict[str, float]]] = []
    room = iter([1, 2, 2, 2])  # for one group, then for both
    monkeypatch.setattr(running, "holds", lambda bundle, labels: next(room, 2))
    ask, let_go = Request.ask, Request.let_go
    monkeypatch.setattr(Request, "ask", lambda self, bundles: (asked.append(list(bundles)), ask(self, bundles)))
    monkeypatch.setattr(Request, "let_go", lambda self: (asked.append([]), let_go(self)))
    tuning = {"classes_per_group": 2, "steps": None, "epochs": 0.5, "trainer": {"num_workers": 1}}
    context, stages = prepare(tiny_world, tmp_path, encoded, finetune=tuning, cluster={"wait_s": 60})
    stage = stages["finetune", ""]
    assert stage.units == ("group-0", "group-1")
    Finetune.run_all(context, [stage])
    assert asked[:2] == [[{"CPU": 1}], []]  # a cluster that can grow is asked for the group that waits
    assert asked[-1] == []
    adapters = Adapters.of(stage, context.storage)
    assert adapters.groups == [[0, 1], [2]]
    # half an epoch of 60 and of 30 images in batches of 8
    assert [len(adapters.losses(group)) for group in (0, 1)] == [4, 2]
    table = "y_embedder.embedding_table.weight"
    before = load_generator(tiny_world / "dit.safetensors").state_dict()[table]
    models = GroupModels(Pretrained.of_file(tiny_world / "dit.safetensors"), adapters, "cpu")
    for label, trained in ((0, {0, 1}), (2, {2})):
        changed = (models.of_class(label).state_dict()[table] != before).any(dim=1)
        assert trained <= set(changed.nonzero().flatten().tolist()) <= trained | {3}  # 3: no class
        expected = load_generator(tiny_world / "dit.safetensors")
        merge_adapter(expected, load(adapters.artifact.read(f"adapter-{adapters.group_of(label)}.safetensors")))
        torch.testing.assert_close(models.of_class(label).state_dict(), expected.state_dict(), rtol=0, atol=0)
    shard = next(Path(context.storage.address(adapters.artifact.folder)).rglob("adapter-1.safetensors"))
    with safe_open(shard, framework="pt") as file:
        about = json.loads(file.metadata()["adapter"])
    assert about["config"]["classes_per_group"] == 2
    assert (about["classes"], about["generator"]) == ([2], stage.params["generator"])
    for group in (0, 1):
        history = context.tracker.client.get_metric_history(context.tracker.run_id, f"group-{group}/share_of_peak")
        assert len(history) == 1
        assert history[0].value > 0


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(tiny_world: Path, tmp_path: Path, encoded: Path):
    objectives = {"diffusion": {"weight": 1e38}}  # the gradient overflows float32 on the first steps
    tuning = {"objectives": objectives, "trainer": {"num_workers": 2}}
    context, stages = prepare(tiny_world, tmp_path, encoded, finetune=tuning)
    stage = stages["finetune", ""]
    order = next(batch_indices(90, 8, 0, 1, seed_for(context.config.seed, "finetune-order", 0) % 2**31)).tolist()
    names = ", ".join(f"train-images-idx3-ubyte[{index}]" for index in order)  # classes lie one after the other in the file
    with pytest.raises(UserError, match=rf"diverged at step 1 \(.*\) on images {re.escape(names)}; .*; lower finetune.lr"):
        Finetune.run_all(context, [stage])
    assert stage.missing(context.storage)
    assert not context.storage.exists(f"{stage.artifact(context.storage).folder}/shards/adapter-0.safetensors")
