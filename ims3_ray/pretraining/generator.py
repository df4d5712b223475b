"""The generator: a class-conditional DiT of pixels or of an autoencoder's latents."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ims3_ray.config import PretrainConfig, canonical
from ims3_ray.config.evaluation import for_colour_alone, for_ipc
from ims3_ray.errors import UserError
from ims3_ray.models.autoencoder import KIND, Autoencoder, decoding_flops, empty_autoencoder, encoding_flops
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.models.student_costs import forward_flops
from ims3_ray.models.students import check_student
from ims3_ray.plan.estimate import scaled
from ims3_ray.pretraining.base import Loop, Target
from ims3_ray.pretraining.quality import Quality, Splits, judge_generator, judge_name
from ims3_ray.stages.candidates import sampling_flops
from ims3_ray.stages.evaluate import network_size
from ims3_ray.training.generator import dit_config, packed


class GeneratorTarget(Target):
    """The training of a generator. A classifier of real images judges its samples."""

    name, section, lengths = "generator", "generator", ("steps", "minutes")

    def check(self) -> None:
        reference, data, model = self.config.autoencoder, self.config.data, self._autoencoder
        if model is not None:
            if model.image_channels != data.channels:
                raise UserError(
                    f"autoencoder '{reference}' takes {model.image_channels} channels but data.channels={data.channels}; "
                    f"set data.channels={model.image_channels}"
                )
            if data.size % model.factor:
                raise UserError(
                    f"autoencoder '{reference}' makes one latent of {model.factor} × {model.factor} pixels, which does not "
                    f"divide data.size={data.size}; set data.size={-(-data.size // model.factor) * model.factor}"
                )
            if self.config.quality.sampling.clip:
                raise UserError(
                    "quality.sampling.clip=true clamps pixels and would spoil latents; set quality.sampling.clip=false"
                )
        if (judge := self.config.quality.judge) is not None:
            if judge.labels != "hard" or judge.normalise == "real":
                raise UserError(
                    f"quality.judge has labels={judge.labels} and normalise={judge.normalise}, but it learns from real images "
                    "alone; set labels=hard and normalise=set"
                )
            if data.channels != 3 and (what := for_colour_alone(judge.augment, judge.normalise)):
                raise UserError(
                    f"quality.judge.{what} is for colour images, but data.channels={data.channels}; set it otherwise"
                )
            size, name = network_size(judge, data.size), judge.students[0]
            batch_size = min(for_ipc(judge.batch_size, -(-self.images // self.classes)), self.images)
            try:
                check_student(name, data.channels, size, self.classes, judge.norm, judge.width, batch_size)
            except UserError as error:
                told = str(error).replace("evaluation.protocols.NAME", "quality.judge")
                raise UserError(f"quality.judge: {told}") from error
        guidance, dropout = self.config.quality.sampling.cfg_scale, self.config.generator.label_dropout
        if guidance > 1 and not dropout:
            raise UserError(
                f"quality.sampling.cfg_scale={guidance:g} needs a generator that has learnt images without a class, but "
                "generator.label_dropout=0; set quality.sampling.cfg_scale=1, or a label_dropout above 0"
            )
        try:
            _ = self._shape
        except ValidationError as error:
            reason, g = error.errors()[0]["msg"].removeprefix("Value error, "), self.config.generator
            raise UserError(
                f"generator.patch_size={g.patch_size}, hidden_size={g.hidden_size}, num_heads={g.num_heads} are no shape of a "
                f"DiT for these images: {reason}"
            ) from error

    @property
    def batch_size(self) -> int:
        return self.config.generator.batch_size

    @property
    def total(self) -> tuple[float, str]:
        g = self.config.generator
        return (float(g.steps), "steps") if g.steps is not None else (g.minutes or 0.0, "minutes")

    @property
    def network(self) -> str:
        shape, side, what = self._shape, self._shape.patch_size, "pixels" if self._autoencoder is None else "latents"
        return (
            f"DiT of {shape.depth} blocks of width {shape.hidden_size}, patches of {side} × {side} {what}, "
            f"{scaled(shape.forward_flops())}FLOP per image forwards"
        )

    def length(self, rate: float) -> tuple[str, float]:
        g, encoding = self.config.generator, 0.0
        if self._autoencoder is not None:
            each = (2 if g.flip else 1) * self.images * encoding_flops(self._autoencoder, self.config.data.size)
            encoding = self.config.trainer.num_workers * each
        step = 3 * self._shape.forward_flops() * g.batch_size
        if g.minutes is None:
            steps, text = float(g.steps or 0), f"{g.steps} steps"
        else:
            steps = 60 * g.minutes * rate / step
            text = f"{g.minutes:g} minutes, which are about {steps:.0f} steps"
        passes = steps * g.batch_size / self.images
        return f"{text} of {g.batch_size} images, {passes:.3g} passes over the images", encoding + steps * step

    @property
    def judging_flops(self) -> float:
        """Those of the judge's training and of the samples that it looks at."""
        data, q = self.config.data, self.config.quality
        if q.judge is None:
            return 0.0
        size = network_size(q.judge, data.size)
        forward = forward_flops(q.judge.students[0], data.channels, size, self.classes, q.judge.norm, q.judge.width)
        epochs = for_ipc(q.judge.epochs, -(-self.images // self.classes))
        sample = forward + sampling_flops(DiTGenerator.of_shape(self._shape), q.sampling)
        if self._autoencoder is not None:
            sample += decoding_flops(self._autoencoder, self._shape.input_size)
        return 3 * forward * epochs * self.images + q.images_per_class * self.classes * sample

    @property
    def judging(self) -> str:
        q = self.config.quality
        if q.judge is None:
            return "none (quality.judge=null)"
        return (
            f"{judge_name(q.judge)}, trained on all training images, looks at {q.images_per_class} "
            f"samples a class; {scaled(self.judging_flops)}FLOP"
        )

    def loop(self, config: PretrainConfig) -> tuple[Loop, dict[str, Any]]:
        from ims3_ray.engine.loops import generator_loop

        return generator_loop, {"config": canonical(config), **self.weights}

    def judge(self, weights: Path, splits: Splits, device: str) -> Quality:
        found = self.weights.get(KIND)
        return judge_generator(self.config, weights, splits, device, found.path() if found else None)

    def untrained(self, names: Sequence[str]) -> bytes:
        return packed(DiT(self._shape), names)

    @property
    def _shape(self) -> DiTConfig:
        data, model = self.config.data, self._autoencoder
        size, channels = (data.size, data.channels) if model is None else (data.size // model.factor, model.latent_channels)
        return dit_config(self.config.generator, size, channels, self.classes, latents=model is not None)

    @cached_property
    def _autoencoder(self) -> Autoencoder | None:
        found = self.weights.get(KIND)
        return None if found is None else empty_autoencoder(found.path())
