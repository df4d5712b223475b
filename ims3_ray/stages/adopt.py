"""Teaching the generator classes that it does not know, by L_Diff alone, before any other stage uses it."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor

from ims3_ray import plugins
from ims3_ray.cluster.capacity import wait_for_capacity
from ims3_ray.cluster.joining import own_device, placed
from ims3_ray.config import AdoptConfig, RunConfig, differing
from ims3_ray.data.transforms import to_signed
from ims3_ray.engine.images import ImageStore
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.shards import parse_unit
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.engine.tasks import awaited
from ims3_ray.engine.weights import Weights
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage, as_json
from ims3_ray.models.encoder import encoder_path, known_classes, load_encoder, settings_beside
from ims3_ray.models.generator import open_generator
from ims3_ray.models.generators.base import Generator
from ims3_ray.stages.adapters import Pretrained, group_unit
from ims3_ray.stages.embed import TEACHER
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.latents import EncodeLatents
from ims3_ray.stages.tuning import PLACES_AND_SPEED, Tuning, check_parameters, check_variance, finetune_groups
from ims3_ray.training.finetuning import finetune_flops

SEEN_PER_CLASS = 200
"""The most real images of a class by which the known class that is most like it is found."""
LIKE = "like.json"
"""Shard with the known class from which each new one starts."""


@dataclass(eq=False)
class Adopt(Tuning):
    """Teaches the generator the classes of the data that it does not know. Its one unit is an adapter with their rows of the
    table of labels."""

    name, settings = "adopt", AdoptConfig
    described_as, remedy = "adoption", "adopt.lr or adopt.table_lr"

    @classmethod
    def plan(cls, planner: Planner, config: RunConfig) -> Adopt | None:
        """Plan the stage; returns None if there is nothing to learn."""
        models, adopt = planner.models(config), config.adopt
        if adopt is None or not models.added:
            return None
        tuning, images = adopt.tuning, Encode.plan(planner, "train", config.data)
        check_variance(tuning, models.generator, "adopt")
        check_parameters(tuning, models.generator, "adopt")
        _check_start(adopt, models.generator, models.added)
        config = config.model_copy(update={"finetune": tuning})
        params: dict[str, Any] = {
            "adopt": differing(adopt, without=(*PLACES_AND_SPEED, "encoder")), "generator": models.generator_weights.digest,
            "seed": config.seed, "groups": [list(models.labels)], "added": list(models.added),
            **plugins.hashes(type(models.generator), *tuning.objectives.active),
        }  # fmt: skip
        weights = {"generator": models.generator_weights}
        if adopt.like == "nearest":
            finder = config.model_copy(update={"encoder": adopt.encoder or config.encoder})
            _check_known(finder, models.known)
            _ = planner.models(finder).encoder  # checked against the channels of the images
            weights["encoder"] = planner.models(finder).encoder_weights
            params |= {"encoder": weights["encoder"].digest, **settings_beside(encoder_path(finder.encoder))}
        elif isinstance(adopt.like, dict):
            _check_like(adopt.like, models.added, models.known)
        inputs: dict[str, Stage] = {"encode": images}
        if latents := EncodeLatents.plan(planner, config):
            inputs["latents"] = latents
        seen = tuning.total_steps(sum(planner.classes.counts)) * tuning.batch_size
        return cls.added(
            planner,
            cls(
                f"adopt {len(models.added)} classes", params, inputs, units=(group_unit(0),), images=seen,
                flops=seen * finetune_flops(models.generator, tuning), weights=weights, config=config,
            ),
        )  # fmt: skip

    @property
    def batch(self) -> Hashable:
        return "adoptions"

    def pretrained(self, storage: Storage) -> Pretrained:
        artifact = self.artifact(storage)
        like = artifact.read_json(LIKE) if LIKE in artifact.shards() else None
        return Pretrained(self.weights["generator"], tuple(self.params["added"]), like=like)

    @classmethod
    def run_all(cls, context: Context, stages: Sequence[Tuning]) -> None:
        for stage in stages:
            assert isinstance(stage, Adopt)
            stage._find_like(context)
        finetune_groups(context, stages)

    def _find_like(self, context: Context) -> None:
        """Store the known class that each new one starts from."""
        artifact, adopt = self.artifact(context.storage), self.run_config.adopt
        assert adopt is not None
        if LIKE in artifact.shards() or adopt.like == "null":
            return
        added: list[str] = self.params["added"]
        if adopt.like == "nearest":
            known = open_generator(self.weights["generator"].path()).names
            found = self._nearest(context, known)
        else:
            found = {name: adopt.like[name] for name in added if name in adopt.like}
        artifact.write(LIKE, as_json(found, self.title))

    def _nearest(self, context: Context, known: Sequence[str]) -> dict[str, str]:
        encode, actors = self.inputs["encode"], context.config.actors
        assert isinstance(encode, Encode)
        units: dict[int, list[str]] = {}
        for unit in encode.units:
            units.setdefault(parse_unit(unit)[0], []).append(unit)
        labels = dict(zip(context.classes.names, encode.labels, strict=True))
        wanted = {name: units[labels[name]] for name in self.params["added"]}
        task = ray.remote(nearest_classes).options(
            max_retries=3, num_cpus=actors.cpus, num_gpus=actors.gpus, **placed(context.config.cluster, "pool")
        )
        where = encode.store(context.storage)
        watch = wait_for_capacity(context.config.cluster, "pool", self.title, [actors.resources])
        found: dict[str, str]
        (found,) = awaited([task.remote(self.weights["encoder"], where, wanted, list(known))], self.title, watch)
        return found


def adopted_classes(planner: Planner, config: RunConfig) -> dict[str, Stage]:
    """The stage that teaches the generator unknown classes, as the input ``adopt`` of a stage that uses the generator; empty if
    it knows them all."""
    stage = Adopt.plan(planner, config)
    return {} if stage is None else {"adopt": stage}


def _check_known(config: RunConfig, known: Sequence[str]) -> None:
    """Raises :class:`UserError` if φ names none of the generator's classes."""
    if config.encoder == TEACHER or not set(known) & set(known_classes(encoder_path(config.encoder))):
        raise UserError(
            f"encoder '{config.encoder}' names none of the classes that the generator knows, so the nearest cannot be found; "
            "set adopt.encoder to an encoder that knows them, or adopt.like=null, or adopt.like={new: known}"
        )


def _check_start(adopt: AdoptConfig, generator: Generator, added: Sequence[str]) -> None:
    """Raises :class:`UserError` if a class would start from the condition of no class, which the generator does not know."""
    named = added if adopt.like == "nearest" else adopt.like if isinstance(adopt.like, dict) else ()
    if not generator.knows_null and (missing := [name for name in added if name not in named]):
        raise UserError(
            f"generator '{generator.title}' knows only images with a class, so class '{missing[0]}' cannot start from "
            "that of no class; name a known class for each in adopt.like, or set adopt.like=nearest"
        )


def _check_like(like: dict[str, str], added: Sequence[str], known: Sequence[str]) -> None:
    """Raises :class:`UserError` for classes that are not in the data, or that the generator does not know."""
    for new, old in like.items():
        if new not in added:
            raise UserError(f"adopt.like names '{new}', which is no class that the generator has to learn: {', '.join(added)}")
        if old not in known:
            near = difflib.get_close_matches(old, known, n=3, cutoff=0.0)
            raise UserError(f"adopt.like.{new}: the generator knows no class '{old}'; nearest: {', '.join(near)}")


@torch.inference_mode()
def nearest_classes(encoder: Weights, images: ImageStore, classes: dict[str, list[str]], known: list[str]) -> dict[str, str]:
    """For each class, given by the units of its images, one of the ``known`` classes: of all ways to give each class another
    one, that with the highest sum of the mean log-probabilities of φ's own classifier. If there are more classes than known
    ones, each known one is given equally often, but for one."""
    device, path = own_device(), encoder.path()
    phi, names = load_encoder(path).to(device), known_classes(path)
    there = [name for name in known if name in names]
    rows = []
    for units in classes.values():
        pixels = images.read_units(units)[:SEEN_PER_CLASS].to(device)
        scores = torch.cat([phi.logits(to_signed(part)) for part in pixels.split(50)]).log_softmax(dim=1).mean(dim=0)
        rows.append(scores[[names.index(name) for name in there]].cpu())
    return dict(zip(classes, assigned(torch.stack(rows), there), strict=True))


def assigned(scores: Tensor, known: Sequence[str]) -> list[str]:
    """For each row of ``scores`` [new, known] the name of a column: no column serves more than ⌈new / known⌉ rows, and the sum
    of the scores is as high as that allows."""
    from scipy.optimize import linear_sum_assignment  # takes half a second to import, in every process

    copies = -(-len(scores) // len(known))
    _, columns = linear_sum_assignment(scores.repeat(1, copies).numpy(), maximize=True)
    return [known[column % len(known)] for column in columns]
