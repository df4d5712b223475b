"""The stages that score a set of images: the real splits, the teacher of soft labels, students."""

from __future__ import annotations

import json
from typing import Any

from ims3_ray.config import ProtocolConfig, WorkConfig, differing
from ims3_ray.config.evaluation import for_ipc
from ims3_ray.cost import embedding_flops, evaluation_flops
from ims3_ray.data.classes import match_classes
from ims3_ray.data.sources import fingerprint, open_source
from ims3_ray.errors import UserError
from ims3_ray.inputs import Data
from ims3_ray.models.encoder import EncoderConfig, check_encoder, class_positions, encoder_config, encoder_path
from ims3_ray.stages.base import Stage, units_of
from ims3_ray.stages.weights import Weights


class Builder(Data):
    """Builds stages so that equal ones are one: those with the same parameters and inputs."""

    def __init__(self, config: WorkConfig, images_per_class: int = 1) -> None:
        super().__init__(config, images_per_class)
        self.work = config
        self.stages: dict[tuple[Any, ...], Stage] = {}
        for name, protocol in config.evaluation.protocols.items():
            self._check_protocol(name, protocol)

    def _once(self, stage: Stage) -> Stage:
        """``stage``, or the one that is there already, with the units of both."""
        inputs = tuple(sorted((name, id(other)) for name, other in stage.inputs.items()))
        found = self.stages.setdefault((stage.kind, json.dumps(stage.params, sort_keys=True, default=list), inputs), stage)
        if more := set(stage.units) - set(found.units):
            scale = (len(found.units) + len(more)) / len(found.units)
            found.units = tuple(sorted({*found.units, *more}))
            found.images, found.flops = round(found.images * scale), found.flops * scale
            found.stored *= scale
        return found

    def encode(self, split: str) -> Stage:
        data = self.work.data
        source, named = (self.train, data.train_split) if split == "train" else (self.test, data.test_split)
        path = data.path if split == "train" else data.test_path or data.path
        units: list[str] = []
        images = 0
        for name in self.classes.names:
            label = source.class_names.index(name)
            count = int((source.labels == label).sum())
            images += count
            units += units_of(label, count, data.unit_size)
        params = {"source": self.fingerprints[split], "split": named, "size": data.size, "channels": data.channels}
        return self._once(
            Stage(
                "encode", f"encode {split} images", {**params, "unit_size": data.unit_size}, units=tuple(units), images=images,
                places={"path": path, "split": named}, label=split, stored=self.pixel_bytes(images),
            )
        )  # fmt: skip

    def pixel_bytes(self, images: int) -> float:
        """Of so many decoded images."""
        return float(images * self.work.data.channels * self.work.data.size**2)

    def class_units(self) -> tuple[str, ...]:
        """A unit per class, by its position in the distilled set."""
        return tuple(f"class-{position:04d}" for position in range(len(self.classes.names)))

    def given(self, title: str, path: str) -> Stage:
        """Images that lie at ``path``, which were made by somebody else."""
        source, data, names = open_source(path, "train"), self.work.data, self.classes.names
        for name, label in zip(names, match_classes(names, source.class_names, path), strict=True):
            if not (source.labels == label).any():
                raise UserError(f"set '{path}' has no image of class '{name}'; add some, or leave it out of data.classes")
        params = {
            "source": fingerprint(source), "names": list(source.class_names), "classes": list(names),
            "size": data.size, "channels": data.channels,
        }  # fmt: skip
        return self._once(
            Stage(
                "given", f"read {title}", params, units=self.class_units(), images=len(source.labels),
                places={"path": path, "split": "train"}, label=title, stored=self.pixel_bytes(len(source.labels)),
            )
        )  # fmt: skip

    def held_out(self) -> Stage:
        """The real training images that choose the epoch of ``val``."""
        data, per_class = self.work.data, self.work.evaluation.val_per_class
        params = {
            "source": self.fingerprints["train"], "split": data.train_split, "size": data.size, "channels": data.channels,
            "classes": list(self.classes.names), "per_class": per_class,
        }  # fmt: skip
        return self._once(
            Stage(
                "held_out", "hold out train images", params, units=self.class_units(),
                images=per_class * len(self.classes.names), places={"path": data.path, "split": data.train_split},
            )
        )  # fmt: skip

    def teacher(self) -> Stage:
        """The teacher of soft labels, trained on the real training split."""
        training, data, images = self.work.evaluation.teacher.training, self.work.data, self.encode("train")
        params = {"training": differing(training), "classes": list(self.classes.names)}
        shape = EncoderConfig(
            model=training.model, model_args=training.model_args, channels=data.channels,
            num_classes=len(self.classes.names), mean=0.0, std=1.0,
        )  # fmt: skip
        count = images.images * training.epochs
        return self._once(
            Stage(
                "teacher", "train the teacher", params, {"images": images, "test": self.encode("test")}, images=count,
                flops=3 * count * embedding_flops(shape, data.size),
            )
        )  # fmt: skip

    def evaluate(self, title: str, images: Stage, ipc: int) -> dict[str, Stage]:
        """Row of the table → the stage that trains its students on a set."""
        config = self.work.evaluation
        return {
            row: self._evaluate(f"evaluate ({title}; {row})", images, config.protocols[protocol], student, ipc, row)
            for row, (protocol, student) in config.rows.items()
        }

    def _evaluate(self, title: str, images: Stage, protocol: ProtocolConfig, student: str, ipc: int, row: str) -> Stage:
        config, teacher = self.work.evaluation, self.work.evaluation.teacher
        params: dict[str, Any] = {"protocol": differing(protocol, without=("students",)), "student": student}
        params["classes"] = list(self.classes.names)  # a set is known by its images alone
        inputs, weights = {"set": images, "test": self.encode("test")}, {}
        if config.val_per_class:
            inputs["val"] = self.held_out()
        if protocol.labels == "soft" and teacher.weights is None:
            inputs["teacher"] = self.teacher()
        elif protocol.labels == "soft":
            assert teacher.weights is not None
            weights["teacher"] = Weights.of(encoder_path, teacher.weights)
            params["teacher"] = weights["teacher"].digest
        size, classes = protocol.size or self.work.data.size, len(self.classes.names)
        tested = inputs["test"].images + classes * config.val_per_class
        flops = evaluation_flops(
            protocol, student, self.work.data.channels, size, classes, for_ipc(protocol.epochs, ipc) * ipc * classes, tested
        )
        return self._once(
            Stage(
                "evaluate", title, params, inputs, units=tuple(f"seed-{seed}" for seed in config.seeds),
                images=ipc * classes * len(config.seeds), flops=flops * len(config.seeds), label=row, weights=weights,
            )
        )  # fmt: skip

    def _check_protocol(self, name: str, protocol: ProtocolConfig) -> None:
        """:class:`UserError` for a protocol that does not go with the images."""
        where, data, teacher = f"evaluation.protocols.{name}", self.work.data, self.work.evaluation.teacher
        if data.channels != 3 and (protocol.normalise == "imagenet" or protocol.augment.lighting):
            what = (
                "normalise=imagenet" if protocol.normalise == "imagenet" else f"augment.lighting={protocol.augment.lighting:g}"
            )
            raise UserError(f"{where}.{what} is for colour images, but data.channels={data.channels}; set it otherwise")
        for student in protocol.students:
            try:
                evaluation_flops(protocol, student, data.channels, protocol.size or data.size, len(self.classes.names), 0, 0)
            except (ValueError, RuntimeError, AssertionError) as error:  # what networks say to images that are too small
                reason = str(error).splitlines()[0]
                raise UserError(f"{where}.students: {student} cannot take these images ({reason}); choose another") from error
        if protocol.labels == "soft" and teacher.weights is not None:
            path = encoder_path(teacher.weights)
            check_encoder(path)
            class_positions(path, self.classes.names, "evaluation.teacher.weights")
            if (channels := encoder_config(path).channels) != data.channels:
                raise UserError(
                    f"teacher '{teacher.weights}' takes {channels} channels but data.channels={data.channels}; choose another"
                )
