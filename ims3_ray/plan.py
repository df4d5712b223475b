"""From a config to the stages it needs, before Ray starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ims3_ray.config import ArmConfig, RunConfig, canonical
from ims3_ray.cost import (
    decoding_flops,
    embedding_flops,
    encoding_flops,
    evaluation_flops,
    finetune_flops,
    instability_flops,
    sampling_flops,
)
from ims3_ray.data.classes import ClassTable, class_groups
from ims3_ray.data.sources import ImageSource
from ims3_ray.errors import UserError
from ims3_ray.inputs import Inputs
from ims3_ray.models.encoder import class_positions
from ims3_ray.selection import SELECTORS
from ims3_ray.stages.base import Stage, units_of
from ims3_ray.stages.weights import Weights


@dataclass
class Plan:
    """The stages in the order in which they run; stages that arms share appear once."""

    config: RunConfig
    classes: ClassTable
    stages: list[Stage]
    evaluations: dict[str, Stage]
    """Arm → its evaluation."""
    export: Stage

    def needed(self) -> dict[str, float]:
        """The largest share of the cluster that a stage takes at a time."""
        t, a, e = self.config.finetune.trainer, self.config.actors, self.config.evaluation
        kinds = {stage.kind for stage in self.stages}
        cpus, gpus = [a.count * a.cpus, e.cpus_per_task], [a.count * a.gpus, e.gpus_per_task]
        if "finetune" in kinds:
            cpus.append(t.num_workers * t.cpus_per_worker)
            gpus.append(t.num_workers * t.gpus_per_worker)
        return {k: v for k, v in {"CPU": max(cpus), "GPU": max(gpus)}.items() if v}


class _Builder(Inputs):
    """Builds stages so that equal ones are one."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.stages: dict[str, Stage] = {}

    def _once(self, name: str, stage: Stage) -> Stage:
        return self.stages.setdefault(name, stage)

    def encode(self, split: str) -> Stage:
        source, data = (self.train, self.config.data) if split == "train" else (self.test, self.config.data)
        path = data.path if split == "train" else data.test_path or data.path
        named = data.train_split if split == "train" else data.test_split
        units, images = self._real_units(source)
        params = {"source": self.fingerprints[split], "split": named, "size": data.size, "channels": data.channels}
        return self._once(
            f"encode-{split}",
            Stage(
                "encode", f"encode {split} images", {**params, "unit_size": data.unit_size}, units=units, images=images,
                places={"path": path, "split": named}, label=split,
            ),
        )  # fmt: skip

    def _real_units(self, source: ImageSource) -> tuple[tuple[str, ...], int]:
        units: list[str] = []
        images = 0
        for name in self.classes.names:
            label = source.class_names.index(name)
            count = int((source.labels == label).sum())
            images += count
            units += units_of(label, count, self.config.data.unit_size)
        return tuple(units), images

    def embed(self, images: Stage, name: str, title: str) -> Stage:
        params: dict[str, Any] = {"phi": self.phi.digest, "shape": canonical(self.phi_shape)}
        real = images.kind == "encode"
        arms = self._arms_of("real" if real else "generated", images.label == "fine-tuned")
        if any("confidence" in _needs(arm) for arm in arms):
            labels = self.classes.source_labels if real else self.classes.generator_labels
            positions = class_positions(self.phi_path, self.classes.names)
            params["heads"] = {str(label): position for label, position in zip(labels, positions, strict=True)}
        flops = images.images * embedding_flops(self.phi_shape, self.config.data.size)
        return self._once(
            f"embed-{name}",
            Stage(
                "embed", title, params, {"images": images}, units=images.units, images=images.images, flops=flops,
                label=name, weights={"encoder": self.phi},
            ),
        )  # fmt: skip

    def latents(self, images: Stage, vae: Weights) -> Stage:
        flips = 2 if self.config.finetune.flip else 1
        assert self.autoencoder is not None
        flops = images.images * flips * encoding_flops(self.autoencoder, self.config.data.size)
        return self._once(
            "latents",
            Stage(
                "latents", "encode latents", {"autoencoder": vae.digest, "flips": flips}, {"images": images},
                units=images.units, images=images.images, flops=flops, weights={"autoencoder": vae},
            ),
        )  # fmt: skip

    def finetune(self) -> Stage:
        config = self.config.finetune
        if config.objectives.diffusion.variance and not self.shape.learn_sigma:
            raise UserError(
                f"generator '{self.weights.name}' predicts no variance; set finetune.objectives.diffusion.variance=false"
            )
        params: dict[str, Any] = canonical(config)
        for detail in ("trainer", "checkpoint_every", "activation_checkpointing", "accumulate", "zero_stage", "compile"):
            params.pop(detail)  # where, how safely and how fast it runs changes rounding at most
        if config.objectives.couple_samples:  # but these terms look at what a worker has before it
            params["parts"] = [config.trainer.num_workers, config.accumulate]
        groups = class_groups(self._labels(), params.pop("classes_per_group"))
        params |= {"generator": self.generator.digest, "seed": self.config.seed, "groups": groups}
        counts = dict(zip(self._labels(), self.classes.counts, strict=True))
        images = sum(config.total_steps(sum(counts[label] for label in group)) * config.batch_size for group in groups)
        inputs = {"encode": self.encode("train")}
        if self.vae:
            inputs["latents"] = self.latents(inputs["encode"], self.vae)
        return self._once(
            "finetune",
            Stage(
                "finetune", "fine-tune", params, inputs, units=tuple(f"group-{number}" for number in range(len(groups))),
                images=images, flops=images * finetune_flops(self.shape, config), weights={"generator": self.generator},
            ),
        )  # fmt: skip

    def instability(self) -> Stage:
        """What is measured of the generators of the fine-tuning, if there is one."""
        config, finetune = self.config.instability, self.finetune()
        params = {**canonical(config), "seed": self.config.seed, "classes": self._labels()}
        return self._once(
            "instability",
            Stage(
                "instability", "instability (Eq. 12)", params, {"finetune": finetune, **finetune.inputs},
                images=config.images, flops=config.images * instability_flops(self.shape, config), weights=finetune.weights,
            ),
        )  # fmt: skip

    def _labels(self) -> list[int]:
        return list(self.classes.generator_labels)

    def generate(self, finetuned: bool, per_class: int) -> Stage:
        s = self.config.sampling
        units = tuple(unit for label in self._labels() for unit in units_of(label, per_class, s.unit_size))
        images = len(units) * s.unit_size
        params = {**canonical(s), "store": self.config.pool.store, "generator": self.generator.digest, "seed": self.config.seed}
        name = "fine-tuned" if finetuned else "pretrained"
        inputs = {"finetune": self.finetune()} if finetuned else {}
        flops, weights = images * sampling_flops(self.shape, s), {"generator": self.generator}
        if self.vae and self.autoencoder:
            params["autoencoder"], weights["autoencoder"] = self.vae.digest, self.vae
            flops += images * decoding_flops(self.autoencoder, self.shape.input_size)
        return self._once(
            f"generate-{name}",
            Stage(
                "generate", f"generate ({name})", params, inputs, units=units, images=images, flops=flops,
                label=name, weights=weights,
            ),
        )  # fmt: skip

    def select(self, name: str, arm: ArmConfig) -> Stage:
        s, needs, pool = self.config.selection, _needs(arm), self._pool(arm)
        params: dict[str, Any] = {
            "select": arm.select, "per": arm.per, "k": s.images_per_class, "classes": list(self.classes.names),
            "seed": self.config.seed,
        }  # fmt: skip
        if arm.select != "s3" or s.references == "generated":
            params["pool"] = pool
        if arm.images == "real":
            images = self.encode("train")
            inputs = {"images": images}
        else:
            images = self.generate(arm.finetune, max(self._pool(a) for a in self._arms_of(arm.images, arm.finetune)))
            inputs = {"images": images}
        real = self.encode("train")
        if needs & {"features", "confidence"}:
            title = "embed train images" if images is real else f"embed ({images.label})"
            inputs["embed"] = self.embed(images, images.label, title)
        if arm.select == "s3" and s.references == "generated":
            inputs["references"] = inputs["embed"]
        elif "references" in needs:
            inputs["references"] = self.embed(real, "train", "embed train images")
        if arm.select == "s3":
            params |= {
                "alpha_beta": [s.alpha, s.beta], "groups": s.groups, "coupling": s.coupling, "references": s.references,
                "references_per_class": s.references_per_class,
            }  # fmt: skip
        units = tuple(f"class-{position:04d}" for position in range(len(self.classes.names)))
        return self._once(
            f"select-{name}",
            Stage("select", f"select ({arm.title})", params, inputs, units=units, images=self._set_size(), label=name),
        )

    def _arms_of(self, images: str, finetune: bool) -> list[ArmConfig]:
        """Those that draw from the same images."""
        return [arm for arm in self.config.arms.values() if (arm.images, arm.finetune) == (images, finetune)]

    def _pool(self, arm: ArmConfig) -> int:
        """Candidates of each class that an arm chooses among; 0 for real images, which are as many as there are."""
        s = self.config.selection
        if arm.images == "real":
            return 0
        if arm.select == "first":
            return s.images_per_class
        return s.groups * s.images_per_class if arm.per == "group" and arm.select != "s3" else self.config.pool_size

    def _set_size(self) -> int:
        return self.config.selection.images_per_class * len(self.classes.names)

    def evaluate(self, name: str, arm: ArmConfig) -> Stage:
        config = self.config.evaluation
        params: dict[str, Any] = canonical(config)
        for detail in ("seeds", "cpus_per_task", "gpus_per_task", "threads_per_task"):
            params.pop(detail)
        inputs = {"select": self.select(name, arm), "test": self.encode("test")}
        flops = evaluation_flops(config, self.config.data, len(self.classes.names), self._set_size(), len(self.test.labels))
        return self._once(
            f"evaluate-{name}",
            Stage(
                "evaluate", f"evaluate ({arm.title})", params, inputs, units=tuple(f"seed-{seed}" for seed in config.seeds),
                images=self._set_size(), flops=flops * len(config.seeds), label=name,
            ),
        )  # fmt: skip


def _needs(arm: ArmConfig) -> frozenset[str]:
    return frozenset({"features", "references"}) if arm.select == "s3" else frozenset(SELECTORS[arm.select].needs)


ORDER = ("encode", "embed", "latents", "finetune", "instability", "generate", "select", "export", "evaluate")


def make_plan(config: RunConfig) -> Plan:
    """Open the sources, check the weights, lay out the stages. Raises :class:`UserError` for bad input."""
    builder = _Builder(config)
    evaluations = {name: builder.evaluate(name, arm) for name, arm in config.arms.items()}
    if "finetune" in builder.stages and config.instability.images:
        builder.instability()
    chosen = builder.select(config.export, config.arms[config.export])
    export = Stage(
        "export", "export", {"classes": list(builder.classes.names)}, {"select": chosen}, images=chosen.images,
        label=config.export,
    )  # fmt: skip
    builder.stages["export"] = export
    return Plan(config, builder.classes, _ordered(list(builder.stages.values())), evaluations, export)


def _ordered(stages: list[Stage]) -> list[Stage]:
    """Every stage after its inputs; what is derived from images right after them, since they run together."""
    done: list[Stage] = []

    def visit(stage: Stage) -> None:
        if stage in done:
            return
        for earlier in stage.inputs.values():
            visit(earlier)
        if stage in done:  # an embedding, come to through the pool it embeds
            return
        done.append(stage)
        for embed in stages:
            if embed.kind in ("embed", "latents") and embed.inputs["images"] is stage:
                visit(embed)

    for stage in sorted(stages, key=lambda s: ORDER.index(s.kind)):
        visit(stage)
    return done
