"""Features φ(x) of real images and of candidates, and the scores that φ's own classifier gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ims3_ray.config import RunConfig, differing
from ims3_ray.engine.images import Derive
from ims3_ray.engine.planner import Planner
from ims3_ray.engine.pool import DerivedStage, ImagePool
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.engine.weights import Weights
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage
from ims3_ray.models.encoder import (
    Encoder,
    EncoderConfig,
    class_positions,
    embedding_cost,
    encoder_path,
    known_classes,
    load_encoder,
)
from ims3_ray.stages.encode import Encode
from ims3_ray.stages.features import Features
from ims3_ray.stages.recognition import Recognition
from ims3_ray.stages.teacher import plan_teacher, read_teacher, teacher_shape

TEACHER = "teacher"
"""The ``encoder`` of a config whose φ is the teacher."""


@dataclass(frozen=True)
class Phi:
    """What the plan knows of φ."""

    shape: EncoderConfig
    params: Mapping[str, Any]
    """What the key of an embedding holds of φ."""
    positions: Sequence[int] | None
    """Index of each class in φ's own classifier; None if it does not know them."""
    weights: Mapping[str, Weights] = field(default_factory=dict)
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    """The stage that trains φ, as ``phi``; empty for given weights."""

    @classmethod
    def of(cls, planner: Planner, config: RunConfig, asked_by: str = "") -> Phi:
        """The φ that the config names. Raises the error of :meth:`Embed.plan`."""
        return cls.of_teacher(planner) if config.encoder == TEACHER else cls.of_weights(planner, config, asked_by)

    @classmethod
    def of_weights(cls, planner: Planner, config: RunConfig, asked_by: str) -> Phi:
        """φ with the weights that the config names. Raises the error of :meth:`Embed.plan`."""
        models, names = planner.models(config), planner.classes.names
        weights, path, positions = models.encoder_weights, encoder_path(config.encoder), None
        if asked_by or set(names) <= set(known_classes(path)):
            positions = class_positions(path, names, asked_by)
        params = {"phi": weights.digest, "shape": differing(models.encoder)}
        return cls(models.encoder, params, positions, {"encoder": weights})

    @classmethod
    def of_teacher(cls, planner: Planner) -> Phi:
        """φ is the teacher, which knows the classes."""
        teacher, shape, names = plan_teacher(planner), teacher_shape(planner), planner.classes.names
        if stage := teacher.inputs.get("teacher"):
            return cls(shape, {}, range(len(names)), inputs={"phi": stage})
        positions = class_positions(encoder_path(planner.work.evaluation.teacher.weights or ""), names, "encoder: teacher")
        params = {"phi": teacher.params["teacher"], "shape": differing(shape)}
        return cls(shape, params, positions, {"encoder": teacher.weights["teacher"]})


@dataclass(eq=False)
class Embed(DerivedStage):
    """Computes features: one shard per unit of images, made by :class:`~ims3_ray.stages.features.Features`."""

    name, version, settings = "embed", 2, EncoderConfig

    real: Embed | None = None
    """For the samples of a generator: the features of real images, with which they are compared."""
    names: tuple[str, ...] = ()
    """Names of the classes."""
    by: str = ""
    """The encoder, as text, where a plan has several."""

    @classmethod
    def plan(cls, planner: Planner, images: ImagePool, config: RunConfig, asked_by: str = "") -> Embed:
        """Plan the features of ``images``, with the scores of φ's own classifier if it knows the classes.

        Raises :class:`UserError` if it does not know them but ``asked_by`` names what needs the scores.
        """
        phi = Phi.of(planner, config, asked_by)
        params = dict(phi.params)
        if phi.positions is not None:
            params["heads"] = {str(label): position for label, position in zip(images.labels, phi.positions, strict=True)}
        real = None
        if images.sampled:
            real = cls.plan(planner, Encode.plan(planner, "train", config.data), config)
            # The first samples are compared with real images before the others are made.
            images.after = tuple(dict.fromkeys([*images.after, *phi.inputs.values(), real]))
        by = "" if config.encoder == getattr(planner.work, "encoder", config.encoder) else f" by {config.encoder}"
        flops, dim = embedding_cost(phi.shape.model_dump_json(), config.data.size)
        return planner.add(
            cls(
                f"embed {images.described}{by}", params, {"images": images, **phi.inputs}, units=images.units,
                images=images.images, flops=images.images * flops, label=images.label, weights=phi.weights,
                stored=images.images * 4.0 * dim, config=config, real=real, names=planner.classes.names, by=by,
            )
        )  # fmt: skip

    @property
    def seen(self) -> str:
        """What φ looks at: the pool and, where a plan has several, φ."""
        return self.source.title + self.by

    def recognition(self, storage: Storage) -> Recognition | None:
        """How many of the first samples φ recognises; None for real images."""
        if self.real is None or self.real.missing(storage):
            return None
        return Recognition.of(self, self.real, self.names, storage)

    def check(self, context: Context) -> None:
        """Raises :class:`UserError` for samples that φ recognises too seldom, if the config says so."""
        if found := self.recognition(context.storage):
            found.check(self.seen, self.run_config.quality)

    def results(self, storage: Storage) -> dict[str, Any]:
        found = self.recognition(storage)
        return {} if found is None else {"recognised": {self.seen: found.plain}}

    def settle(self) -> None:
        self.widen(self.source.units)

    def derive(self, storage: Storage) -> Callable[[str], Derive]:
        trained = self.inputs.get("phi")
        phi = trained.artifact(storage) if trained is not None else self.weights["encoder"]
        return partial(_features, phi, self.params.get("heads"))


def open_phi(phi: Weights | Artifact) -> Encoder:
    """φ of given weights, or as the teacher in the artifact that its training made."""
    return read_teacher(phi) if isinstance(phi, Artifact) else load_encoder(phi.path())


def _features(phi: Weights | Artifact, heads: Mapping[str, int] | None, device: str) -> Features:
    return Features(open_phi(phi), device, heads)
