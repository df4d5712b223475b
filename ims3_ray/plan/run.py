"""The stages of a distillation: what is made of the real images, the generators, the candidates, the chosen sets."""

from __future__ import annotations

from typing import Any

from ims3_ray.config import ArmConfig, RunConfig, differing
from ims3_ray.cost import (
    decoding_flops,
    embedding_dim,
    embedding_flops,
    encoding_flops,
    finetune_flops,
    instability_flops,
    inversion_flops,
    refine_flops,
    sampling_flops,
)
from ims3_ray.data.classes import ClassTable, class_groups
from ims3_ray.errors import UserError
from ims3_ray.inputs import Models
from ims3_ray.models.encoder import class_positions, known_classes
from ims3_ray.models.generator import class_indices
from ims3_ray.plan.scoring import Builder
from ims3_ray.selection import SELECTORS
from ims3_ray.stages.base import Stage, by_class, units_of
from ims3_ray.stages.weights import Weights

PNG_SHARE = 0.6
"""What is left of pixels as PNG, of photographs."""


PLACES_AND_SPEED = ("trainer", "checkpoint_every", "activation_checkpointing", "accumulate", "zero_stage", "compile")
"""Settings of a fine-tuning that say where, how safely and how fast it runs: they change rounding at most."""


class RunBuilder(Builder):
    """Every method is given the config as the arm has it that the stage is for."""

    def __init__(self, config: RunConfig, images_per_class: int) -> None:
        self.models, self.base = Models(config), config
        self._by_encoder = {config.encoder: self.models}
        super().__init__(config, images_per_class)
        c = self.classes
        labels = class_indices(self.models.weights, c.names)
        self.classes = ClassTable(c.names, c.source_labels, tuple(labels), c.counts)

    def embed(self, images: Stage, config: RunConfig, asked_by: str | None = None) -> Stage:
        """φ of images, with the scores of its own classifier where it knows the classes; it must if ``asked_by`` something."""
        if config.encoder not in self._by_encoder:
            self._by_encoder[config.encoder] = Models(config)
        m = self._by_encoder[config.encoder]
        params: dict[str, Any] = {"phi": m.phi.digest, "shape": differing(m.phi_shape)}
        if asked_by or set(self.classes.names) <= set(known_classes(m.phi_path)):
            labels = self.classes.source_labels if images.kind == "encode" else self.classes.generator_labels
            positions = class_positions(m.phi_path, self.classes.names, asked_by or "")
            params["heads"] = {str(label): position for label, position in zip(labels, positions, strict=True)}
        flops = images.images * embedding_flops(m.phi_shape, self.work.data.size)
        title = "embed train images" if images.kind == "encode" else f"embed ({images.label})"
        title += "" if config.encoder == self.base.encoder else f" by {config.encoder}"
        stored = images.images * 4.0 * embedding_dim(m.phi_shape)
        return self._derived("embed", title, params, images, flops, {"encoder": m.phi}, stored, images.label)

    def latents(self, config: RunConfig) -> Stage | None:
        """Latents of the training images, for generators that work on them."""
        m, images, flips = self.models, self.encode("train"), 2 if config.finetune.flip else 1
        if m.vae is None or m.autoencoder is None:
            return None
        flops = images.images * flips * encoding_flops(m.autoencoder, self.work.data.size)
        params = {"autoencoder": m.vae.digest, "flips": flips}
        stored = 2 * flips * images.images * self._latent_bytes()
        return self._derived("latents", "encode latents", params, images, flops, {"autoencoder": m.vae}, stored)

    def _latent_bytes(self) -> float:
        """Of an image's latents in half precision."""
        return 2.0 * self.models.shape.in_channels * self.models.shape.input_size**2

    def inverted(self, config: RunConfig) -> Stage:
        """Sums over inverted training images (D3HR)."""
        m, s, images = self.models, config.sampling, self.encode("train")
        params: dict[str, Any] = {
            "generator": m.generator.digest, "steps": s.steps, "until": s.inverted_gaussian.until, "cfg_scale": s.cfg_scale,
            "cfg_channels": s.cfg_channels, "cfg_interval": s.cfg_interval, "precision": s.precision,
            "labels": dict(zip(map(str, self.classes.source_labels), self.classes.generator_labels, strict=True)),
        }  # fmt: skip
        weights, each = {"generator": m.generator}, inversion_flops(m.shape, s)
        if m.vae and m.autoencoder:
            params["autoencoder"], weights["autoencoder"] = m.vae.digest, m.vae
            each += encoding_flops(m.autoencoder, self.work.data.size)
        units = by_class(images.units)
        if limit := s.inverted_gaussian.images_per_class:
            params["kept"] = -(-limit // self.work.data.unit_size)
            units = {label: names[: params["kept"]] for label, names in units.items()}
        kept = tuple(unit for names in units.values() for unit in names)
        count = images.images * len(kept) // len(images.units)
        return self._once(
            Stage(
                "inverted", "invert train images", params, {"images": images}, units=kept, images=count, flops=count * each,
                weights=weights,
            )
        )  # fmt: skip

    def _derived(
        self, kind: str, title: str, params: dict[str, Any], images: Stage, flops: float, weights: dict[str, Weights],
        stored: float, label: str = "",
    ) -> Stage:  # fmt: skip
        return self._once(
            Stage(
                kind, title, params, {"images": images}, units=images.units, images=images.images, flops=flops, label=label,
                weights=weights, stored=stored,
            )
        )  # fmt: skip

    def modes(self, config: RunConfig) -> Stage:
        """K modes of each class's training images (MGD3)."""
        params = {"k": config.selection.images_per_class, "seed": config.seed, "classes": list(self.classes.names)}
        inputs = {"images": self.encode("train")}
        if latents := self.latents(config):
            inputs["latents"] = latents
        images = inputs["images"].images
        return self._once(Stage("modes", f"find {params['k']} modes", params, inputs, units=self.class_units(), images=images))

    def finetune(self, config: RunConfig) -> Stage:
        m, tuning = self.models, config.finetune
        if tuning.objectives.diffusion.variance and not m.shape.learn_sigma:
            raise UserError(
                f"generator '{m.weights.name}' predicts no variance; set finetune.objectives.diffusion.variance=false"
            )
        labels = list(self.classes.generator_labels)
        groups = class_groups(labels, tuning.classes_per_group)
        params: dict[str, Any] = {
            "finetune": differing(tuning, without=(*PLACES_AND_SPEED, "classes_per_group")), "generator": m.generator.digest,
            "seed": config.seed, "groups": groups,
        }  # fmt: skip
        if tuning.objectives.couple_samples:  # but these terms look at what a worker has before it
            params["parts"] = [tuning.trainer.num_workers, tuning.accumulate]
        counts = dict(zip(labels, self.classes.counts, strict=True))
        images = sum(tuning.total_steps(sum(counts[label] for label in group)) * tuning.batch_size for group in groups)
        inputs = {"encode": self.encode("train")}
        if latents := self.latents(config):
            inputs["latents"] = latents
        return self._once(
            Stage(
                "finetune", self._tuned(config).replace("fine-tuned", "fine-tune"), params, inputs,
                units=tuple(f"group-{number}" for number in range(len(groups))), images=images,
                flops=images * finetune_flops(m.shape, tuning), weights={"generator": m.generator}, config=config,
            )
        )  # fmt: skip

    def _tuned(self, config: RunConfig) -> str:
        """What a fine-tuned generator is called."""
        own = config.finetune != self.base.finetune
        return f"fine-tuned with {config.finetune.objectives.title}" if own else "fine-tuned"

    def instability(self, config: RunConfig) -> Stage:
        """What is measured of the generators before and after a fine-tuning."""
        measured, finetune = config.instability, self.finetune(config)
        params = {
            "instability": differing(measured), "seed": config.seed, "classes": list(self.classes.generator_labels),
        }  # fmt: skip
        return self._once(
            Stage(
                "instability", "instability (Eq. 12)", params, {"finetune": finetune, **finetune.inputs},
                images=measured.images, flops=measured.images * instability_flops(self.models.shape, measured),
                weights=finetune.weights, config=config,
            )
        )  # fmt: skip

    def generate(self, arm: ArmConfig, config: RunConfig) -> Stage:
        m, s = self.models, config.sampling
        per_class = config.selection.images_per_class if arm.select == "first" else config.pool_size
        units = tuple(unit for label in self.classes.generator_labels for unit in units_of(label, per_class, s.unit_size))
        images = len(units) * s.unit_size
        params: dict[str, Any] = {
            "sampling": differing(s), "store": config.pool.store, "generator": m.generator.digest, "seed": config.seed,
        }  # fmt: skip
        inputs = {"finetune": self.finetune(config)} if arm.finetune else {}
        names = [self._tuned(config) if arm.finetune else "pretrained"]
        if s.mode_guidance.strength:
            inputs["modes"] = self.modes(config)
            names.append(f"guided to {config.selection.images_per_class} modes")
        if s.inverted_gaussian.groups:
            inputs["inverted"], params["k"] = self.inverted(config), config.selection.images_per_class
            names.append(f"from inverted starts, K = {params['k']}")
        if s != self.base.sampling:
            names.append(f"{s.sampler}, {s.steps} steps, guidance {s.cfg_scale:g}")
        flops, weights = images * sampling_flops(m.shape, s), {"generator": m.generator}
        if m.vae and m.autoencoder:
            params["autoencoder"], weights["autoencoder"] = m.vae.digest, m.vae
            flops += images * decoding_flops(m.autoencoder, m.shape.input_size)
        latents = config.pool.store == "latents"
        stored = images * self._latent_bytes() if latents else PNG_SHARE * self.pixel_bytes(images)
        return self._once(
            Stage(
                "generate", f"generate ({', '.join(names)})", params, inputs, units=units, images=images, flops=flops,
                label=", ".join(names), weights=weights, config=config, stored=stored,
            )
        )  # fmt: skip

    def set_of(self, label: str, title: str, arm: ArmConfig, config: RunConfig) -> Stage:
        """The arm's K images per class."""
        chosen = self._select(label, title, arm, config)
        return self._refine(label, title, config, chosen) if arm.refine else chosen

    def _select(self, label: str, title: str, arm: ArmConfig, config: RunConfig) -> Stage:
        s, needs = config.selection, _needs(arm)
        params: dict[str, Any] = {
            "select": arm.select, "per": arm.per, "k": s.images_per_class, "classes": list(self.classes.names),
        }  # fmt: skip
        if s.references_per_class if arm.select == "s3" else SELECTORS[arm.select].draws:
            params["seed"] = config.seed
        if arm.select != "s3" or s.references == "generated":
            params["pool"] = self._pool(arm, config)
        images = self.encode("train") if arm.images == "real" else self.generate(arm, config)
        inputs = {"images": images}
        if needs & {"features", "confidence"}:
            inputs["embed"] = self.embed(images, config, f"select: {arm.select}" if "confidence" in needs else None)
        if arm.select == "s3" and s.references == "generated":
            inputs["references"] = inputs["embed"]
        elif "references" in needs:
            inputs["references"] = self.embed(self.encode("train"), config)
        if arm.select == "s3":
            params |= {
                "alpha_beta": [s.alpha, s.beta], "groups": s.groups, "coupling": s.coupling, "references": s.references,
                "references_per_class": s.references_per_class,
            }  # fmt: skip
        return self._once(
            Stage(
                "select", f"select ({title})", params, inputs, units=self.class_units(), images=self._set_size(config),
                label=label, config=config, stored=self.pixel_bytes(self._set_size(config)),
            )
        )  # fmt: skip

    def _refine(self, label: str, title: str, config: RunConfig, chosen: Stage) -> Stage:
        """The chosen images, optimised further by the generator that they come from."""
        m, source = self.models, chosen.inputs["images"]
        params = {
            "refine": differing(config.refine), "generator": m.generator.digest, "seed": config.seed,
            "labels": list(self.classes.generator_labels),
        }  # fmt: skip
        inputs = {"set": chosen} | {name: stage for name, stage in source.inputs.items() if name == "finetune"}
        if m.vae:
            inputs["images"] = source  # their latents, if they are kept
        images = self._set_size(config)
        return self._once(
            Stage(
                "refine", f"refine ({title})", params, inputs, units=self.class_units(), images=images,
                flops=images * refine_flops(m.shape, config.refine), label=label, weights=source.weights, config=config,
                stored=self.pixel_bytes(images),
            )
        )  # fmt: skip

    def _pool(self, arm: ArmConfig, config: RunConfig) -> int:
        """Candidates of each class that an arm chooses among; 0 for real images, which are as many as there are."""
        s = config.selection
        if arm.images == "real":
            return 0
        if arm.select == "first":
            return s.images_per_class
        return s.groups * s.images_per_class if arm.per == "group" and arm.select != "s3" else config.pool_size

    def _set_size(self, config: RunConfig) -> int:
        return config.selection.images_per_class * len(self.classes.names)

    def export(self, images: Stage, config: RunConfig, label: str) -> Stage:
        params, stored = {"classes": list(self.classes.names)}, 2 * PNG_SHARE * self.pixel_bytes(images.images)
        inputs = {"select": images}
        return self._once(
            Stage("export", "export", params, inputs, images=images.images, label=label, config=config, stored=stored)
        )


def _needs(arm: ArmConfig) -> frozenset[str]:
    return frozenset({"features", "references"}) if arm.select == "s3" else frozenset(SELECTORS[arm.select].needs)
