"""Evaluation as parallel Ray tasks, one per (set of images, seed)."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import ray
import torch

from ims3_ray.artifacts import Artifact
from ims3_ray.cluster import own_device, results
from ims3_ray.config import EvaluationConfig
from ims3_ray.evaluation import train_student
from ims3_ray.progress import Progress
from ims3_ray.stages.base import Context, Stage, by_class, commit_units, read_class
from ims3_ray.stages.select import read_chosen


def unit_of(seed: int) -> str:
    return f"seed-{seed}"


def evaluate_seed(
    chosen: Artifact, test: Artifact, test_units: list[list[str]], plain: dict[str, Any], seed: int
) -> dict[str, Any]:
    """Train one student on the chosen images and test it; ``test_units`` are the test shards of each class."""
    config = EvaluationConfig.model_validate(plain)
    torch.set_num_threads(config.threads_per_task)
    began = time.monotonic()
    parts = [read_class(test, units, "pixels") for units in test_units]
    labels = torch.cat([torch.full((len(part),), position) for position, part in enumerate(parts)])
    test_set = torch.cat(parts), labels
    _, accuracy = train_student(read_chosen(chosen), test_set, len(parts), config, seed, own_device())
    return {**asdict(accuracy), "seconds": time.monotonic() - began}


def run_all(context: Context, stages: list[Stage]) -> None:
    """Run every missing (stage, seed) at once; each result is stored as it arrives."""
    config, storage = context.config.evaluation, context.storage
    task = ray.remote(evaluate_seed).options(num_cpus=config.cpus_per_task, num_gpus=config.gpus_per_task, max_retries=3)
    running: dict[Any, tuple[Stage, int]] = {}
    for stage in {stage.key(storage): stage for stage in stages}.values():
        chosen, test = stage.inputs["select"].artifact(storage), stage.inputs["test"]
        units = by_class(test.units)
        test_units = [units[label] for label in context.classes.source_labels]
        for seed in config.seeds:
            if unit_of(seed) in stage.missing(storage):
                ref = task.remote(chosen, test.artifact(storage), test_units, config.model_dump(mode="json"), seed)
                running[ref] = (stage, seed)
    with Progress("evaluate", len(running), "students") as progress:
        while running:
            (ref,), _ = ray.wait(list(running), num_returns=1)
            stage, seed = running.pop(ref)
            outcome = results(ref)
            stage.artifact(storage).write(f"{unit_of(seed)}.json", json.dumps(outcome).encode())
            commit_units(stage.artifact(storage), {unit_of(seed): outcome}, outcome["seconds"])
            progress.advance(1)
