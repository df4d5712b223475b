"""Fine-tuning of the generator by the objectives of the config."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ims3_ray import plugins
from ims3_ray.config import FinetuneConfig, RunConfig, differing
from ims3_ray.data.classes import class_groups
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.stage import Stage
from ims3_ray.stages.adapters import group_unit
from ims3_ray.stages.adopt import adopted_classes
from ims3_ray.stages.captions import captions_hash
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.latents import EncodeLatents
from ims3_ray.stages.tuning import PLACES_AND_SPEED, Tuning, check_parameters, check_variance
from ims3_ray.training.finetuning import finetune_flops


@dataclass(eq=False)
class Finetune(Tuning):
    """Fine-tunes the generator, of whose adapters each class group has its own."""

    name, version, settings, of_arm, counted = "finetune", 2, FinetuneConfig, True, "fine_tunes"

    @classmethod
    def plan(cls, planner: Planner, config: RunConfig) -> Finetune:
        """Plan a fine-tuning. Raises :class:`UserError` for objectives that the generator does not support."""
        models, tuning = planner.models(config), config.finetune
        generator, objectives = models.generator, tuning.objectives
        check_variance(tuning, generator, "finetune")
        check_parameters(tuning, generator, "finetune")
        images = Encode.plan(planner, "train", models.data_at_its_size)
        groups = class_groups(models.labels, tuning.classes_per_group)
        params: dict[str, Any] = {
            "finetune": differing(tuning, without=(*PLACES_AND_SPEED, "classes_per_group")),
            "generator": models.generator_weights.digest, "seed": config.seed, "groups": groups,
            **plugins.hashes(type(generator), *objectives.active),
        }  # fmt: skip
        if models.told is not None:
            params["told"] = models.told
        if tuning.words == "captions":
            params["captions"] = captions_hash(planner, config, "finetune.words")
        if objectives.couple_samples:  # such terms depend on how a batch is divided among workers
            most = tuning.trainer.max_workers
            params["parts"] = [tuning.trainer.num_workers, tuning.accumulate, *([] if most is None else [most])]
        counts = dict(zip(models.labels, planner.classes.counts, strict=True))
        seen = sum(tuning.total_steps(sum(counts[label] for label in group)) * tuning.batch_size for group in groups)
        inputs: dict[str, Stage] = {"encode": images, **adopted_classes(planner, config)}
        if latents := EncodeLatents.plan(planner, config):
            inputs["latents"] = latents
        return cls.added(
            planner,
            cls(
                tuned_title(planner, config).replace("fine-tuned", "fine-tune"), params, inputs,
                units=tuple(group_unit(number) for number in range(len(groups))), images=seen,
                flops=seen * finetune_flops(generator, tuning), weights={"generator": models.generator_weights}, config=config,
            ),
        )  # fmt: skip

    @property
    def batch(self) -> Hashable:
        return "fine-tunings"


def tuned_title(planner: Planner, config: RunConfig) -> str:
    """The title of a fine-tuned generator: it names the objectives, the generator and the size that an arm does not share."""
    run, names = planner.work, []
    if isinstance(run, RunConfig):
        names = [config.finetune.objectives.title] if config.finetune != run.finetune else []
        names += [config.generator] if config.generator != run.generator else []
        names += [f"at {config.data.size} pixels"] if config.data.size != run.data.size else []
    return f"fine-tuned with {', '.join(names)}" if names else "fine-tuned"
