"""The candidate pool: samples of the pretrained or fine-tuned generator, addressed by class and index."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

from ims3_ray import plugins
from ims3_ray.config import ArmConfig, RunConfig, SamplingConfig, differing
from ims3_ray.diffusion.samplers.base import Sampler
from ims3_ray.diffusion.schedule import spacing_version
from ims3_ray.engine.images import ImageStore, Producer
from ims3_ray.engine.planner import PNG_SHARE, Planner, pixel_bytes
from ims3_ray.engine.pool import ImagePool
from ims3_ray.engine.shards import units_of
from ims3_ray.engine.stage import Context, Stage
from ims3_ray.errors import UserError
from ims3_ray.io.storage import Storage
from ims3_ray.models.autoencoder import decoding_flops
from ims3_ray.stages.adapters import Adapters, Pretrained
from ims3_ray.stages.adopt import adopted_classes
from ims3_ray.stages.candidates import Steered, candidates_of, sampling_flops
from ims3_ray.stages.finetune import Finetune, tuned_title
from ims3_ray.stages.recognition import looked_at

LONG_S = 300.0
"""Estimated seconds of a pool from which its first units are looked at before the others are made."""


@dataclass(eq=False)
class Generate(ImagePool):
    """Generates candidates. Each unit holds ``sampling.unit_size`` candidates of one class, made by
    :class:`~ims3_ray.stages.candidates.Candidates`."""

    name, version, settings, of_arm, counted = "generate", 2, SamplingConfig, True, "pools"

    @classmethod
    def plan(cls, planner: Planner, arm: ArmConfig, config: RunConfig) -> Generate:
        """Plan as many candidates as the arm chooses from."""
        models, s, k, base = planner.models(config), config.sampling, config.selection.images_per_class, planner.work
        generator, labels = models.generator, models.labels
        per_class = k if arm.select == "first" else config.pool_size
        units = tuple(unit for label in labels for unit in units_of(label, per_class, s.unit_size))
        images = len(units) * s.unit_size
        params: dict[str, Any] = {
            "sampling": differing(s), "store": config.pool.store, "generator": models.generator_weights.digest,
            "seed": config.seed, **plugins.hashes(type(generator), Sampler.registry[s.sampler], s.steering),
        }  # fmt: skip
        if models.told is not None:
            params["told"] = models.told
        if models.image_size != config.data.size:
            params["size"] = config.data.size
        params |= spacing_version(s.steps, Sampler.registry[s.sampler].spacing)
        inputs: dict[str, Stage] = adopted_classes(planner, config)
        names = ["adopted" if inputs else "pretrained"]
        if arm.finetune:
            inputs["finetune"], names = Finetune.plan(planner, config), [tuned_title(planner, config)]
        if (steering := s.steering) is not None:
            if steering.says_captions(s.of(steering)) and not generator.takes_words:
                raise UserError(
                    f"sampling.{steering.name}.words=captions is for a generator that takes words (Stable Diffusion), and "
                    f"'{config.generator}' is told labels; set it to class, or name another generator"
                )
            source: Any = Stage.registry[steering.source]
            inputs[steering.source] = source.plan(planner, config)
            if "k" not in inputs[steering.source].params:
                params["k"] = k
            if steering.version > 1:
                params["steering"] = steering.version
            names.append(steering.title(s.of(steering), k))
        if isinstance(base, RunConfig) and s != base.sampling:
            names.append(f"{s.sampler}, {s.steps} steps, guidance {s.cfg_scale:g}")
        if isinstance(base, RunConfig) and config.generator != base.generator:
            names.append(config.generator)
        flops, weights = images * sampling_flops(generator, s), {"generator": models.generator_weights}
        if models.autoencoder is not None and models.autoencoder_weights is not None:
            params |= {"autoencoder": models.autoencoder_weights.digest, **models.autoencoder.version}
            weights["autoencoder"] = models.autoencoder_weights
            flops += images * decoding_flops(models.autoencoder, generator.latent[1])
        latents = config.pool.store == "latents"
        stored = images * models.latent_bytes if latents else PNG_SHARE * pixel_bytes(images, config)
        return planner.add(
            cls(
                f"generate ({', '.join(names)})", params, inputs, units=units, images=images, flops=flops,
                label=", ".join(names), weights=weights, config=config, stored=stored, labels=labels, unit_size=s.unit_size,
            )
        )  # fmt: skip

    @property
    def sampled(self) -> bool:
        return True

    def looked_at_first(self) -> list[str]:
        """The first units of some classes, if all units will take long."""
        worker = self.worker(self.run_config)
        if self.flops / worker.flop_rate(self.run_config.cluster) / worker.at_once < LONG_S:
            return []
        return [self.units_of_class(position)[0] for position in looked_at(len(self.labels))]

    @property
    def batch(self) -> Hashable:
        return "candidates"

    @property
    def described(self) -> str:
        return f"({self.label})"

    @property
    def same_hardware(self) -> bool:
        return not self.run_config.pool.mix_hardware

    def store(self, storage: Storage) -> ImageStore:
        precision = self.run_config.sampling.precision
        return ImageStore(
            self.artifact(storage), self.params["store"], self.weights.get("autoencoder"), precision, self.params.get("size")
        )

    def producer(self, context: Context) -> Callable[[str], Producer]:
        tuned = self.inputs.get("finetune")
        adapters = Adapters.of(tuned, context.storage) if tuned is not None else None
        pretrained, vae = Pretrained.of(self, context.storage), self.weights.get("autoencoder")
        sampling, seed = self.run_config.sampling, self.run_config.seed
        return candidates_of(sampling, pretrained, vae, adapters, seed, self._steered(context), self.params.get("size"))

    def _steered(self, context: Context) -> Steered | None:
        s, k = self.run_config.sampling, self.run_config.selection.images_per_class
        if s.steering is None:
            return None
        source = self.inputs[s.steering.source]
        units = {label: source.units_of_class(position) for position, label in enumerate(self.labels)}
        return Steered(s.steering, s.of(s.steering), k, self.run_config.seed, s.steps, source.artifact(context.storage), units)
