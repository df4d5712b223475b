"""Fine-tuning alone, on real Ray Train and DeepSpeed: how it is spread over workers changes rounding, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ims3_ray import UserError
from ims3_ray.stages import finetune, pool, train
from tests.ray.conftest import prepare

EVERYTHING = {
    "inversion_matching": {"weight": 0.1, "n_steps": 2, "grad_steps": 1, "similarity": "l2"},
    "inversion_matching_released": {"weight": 0.1},
    "minimax": {"representativeness": 0.1, "diversity": 0.1, "memory": 4, "shared": True},
}


def tuned(world: Path, storage: Path, **settings: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The adapter and the rows of a fine-tuning of four steps."""
    context, stages = prepare(world, storage, finetune=settings)
    pool.produce(context, stages["encode", "train"], None)
    finetune.run(context, stages["finetune", ""])
    artifact = stages["finetune", ""].artifact(context.storage)
    return load(artifact.read("adapter.safetensors")), json.loads(artifact.read("losses.json"))


def every_zero_stage(arguments: dict[str, Any]) -> dict[str, Any]:
    """The loop once per ZeRO stage in the same workers, whose start takes longer than all of them.

    The last leaves a checkpoint at step 2, from which its second call goes on.
    """
    outcomes = {}
    for name, stage, every in (("0", 0, 100), ("1", 1, 100), ("2", 2, 100), ("3", 3, 2), ("3 continued", 3, 2)):
        changed = {**arguments["config"], "zero_stage": stage, "checkpoint_every": every}
        outcomes[name] = finetune.finetune_loop({**arguments, "config": changed})
    return outcomes


def test_two_workers_under_any_zero_stage_learn_what_one_process_learns(tiny_world: Path, tmp_path: Path, cluster: None):
    outcomes = {}
    for workers in (1, 2):
        context, stages = prepare(tiny_world, tmp_path / str(workers), finetune={"trainer": {"num_workers": workers}})
        pool.produce(context, stages["encode", "train"], None)
        arguments = finetune.arguments_of(context, stages["finetune", ""])
        place = str(tmp_path / str(workers))
        outcomes[workers] = train.fit(every_zero_stage, arguments, context.config.finetune.trainer, "train", place)
    expected = outcomes[1]["0"]
    for outcome in (*outcomes[1].values(), *outcomes[2].values()):
        for row, wanted in zip(outcome["history"], expected["history"], strict=True):
            assert row == pytest.approx(wanted, rel=1e-3, abs=1e-5)
        torch.testing.assert_close(load(outcome["adapter"]), load(expected["adapter"]), rtol=1e-3, atol=2e-5)


def test_all_objectives_run_together_and_add_up(tiny_world: Path, tmp_path: Path, cluster: None):
    adapter, rows = tuned(tiny_world, tmp_path, objectives=EVERYTHING)
    assert all(value.isfinite().all() for value in adapter.values())
    for row in rows:
        weighted = row["loss_diffusion"] + 0.1 * sum(
            row[f"loss_{name}"]
            for name in ("inversion_matching", "inversion_matching_released", "representativeness", "diversity")
        )
        assert row["loss"] == pytest.approx(weighted, rel=1e-4)
    assert rows[0]["loss_diversity"] == 0
    assert rows[-1]["loss_diversity"] != 0


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_what_was_good(tiny_world: Path, tmp_path: Path, cluster: None):
    objectives = {"diffusion": {"weight": 1e38}}  # the gradient overflows float32 on the first steps
    context, stages = prepare(tiny_world, tmp_path, finetune={"objectives": objectives})
    pool.produce(context, stages["encode", "train"], None)
    stage = stages["finetune", ""]
    with pytest.raises(UserError, match=r"diverged at step 1 \(.*\) on images \w+/\d+, .*; lower finetune.lr"):
        finetune.run(context, stage)
    assert stage.missing(context.storage)
    assert not context.storage.exists(f"{stage.artifact(context.storage).folder}/shards/adapter.safetensors")
