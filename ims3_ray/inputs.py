"""What a run is given: data, weights, classes. All that can be wrong with them is found when they are opened."""

from __future__ import annotations

from functools import cached_property

from ims3_ray.config import RunConfig, WorkConfig
from ims3_ray.data.classes import ClassTable, chosen_labels, count_images
from ims3_ray.data.sources import fingerprint, open_source
from ims3_ray.errors import UserError
from ims3_ray.models.autoencoder import autoencoder_path, empty_autoencoder
from ims3_ray.models.encoder import check_encoder, encoder_config, encoder_path
from ims3_ray.models.generator import check_generator, generator_config, generator_path
from ims3_ray.stages.weights import Weights


class Data:
    """The two splits, opened, and the classes that are distilled. Raises :class:`UserError`."""

    def __init__(self, config: WorkConfig, images_per_class: int = 1) -> None:
        """Every class must have ``images_per_class`` training images."""
        data = config.data
        self.train = open_source(data.path, data.train_split)
        self.test = open_source(data.test_path or data.path, data.test_split)
        if missing := set(self.train.class_names) ^ set(self.test.class_names):
            raise UserError(f"train and test split do not hold the same classes: '{min(missing)}' is in one only")
        labels = chosen_labels(self.train.class_names, data.classes)
        counts = count_images(self.train.labels, self.train.class_names, labels, images_per_class)
        names = tuple(self.train.class_names[label] for label in labels)
        self.classes = ClassTable(names, tuple(labels), tuple(labels), tuple(counts))

    # Large files and folders of millions are looked at once a plan.
    @cached_property
    def fingerprints(self) -> dict[str, str]:
        return {"train": fingerprint(self.train), "test": fingerprint(self.test)}


class Models:
    """The generator, its autoencoder and φ, found and checked against the data and each other. Raises :class:`UserError`."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.weights, self.phi_path = generator_path(config.generator), encoder_path(config.encoder)
        vae_path = autoencoder_path(config.autoencoder) if config.autoencoder else None
        self.autoencoder = empty_autoencoder(vae_path) if vae_path else None
        self.shape, self.phi_shape = generator_config(self.weights), encoder_config(self.phi_path)
        check_generator(self.weights)
        check_encoder(self.phi_path)
        self._check_pixels()

    @cached_property
    def generator(self) -> Weights:
        return Weights.of(generator_path, self.config.generator)

    @cached_property
    def phi(self) -> Weights:
        return Weights.of(encoder_path, self.config.encoder)

    @cached_property
    def vae(self) -> Weights | None:
        return Weights.of(autoencoder_path, self.config.autoencoder) if self.config.autoencoder else None

    def _check_pixels(self) -> None:
        data, shape, vae = self.config.data, self.shape, self.autoencoder
        channels, size = (vae.image_channels, shape.input_size * vae.factor) if vae else (shape.in_channels, shape.input_size)
        if vae is None and shape.in_channels not in (1, 3):
            raise UserError(
                f"generator '{self.weights.name}' works on {shape.in_channels}-channel latents; "
                "name their autoencoder, e.g. autoencoder=stabilityai/sd-vae-ft-ema"
            )
        if vae is None and self.config.pool.store == "latents":
            raise UserError("pool.store=latents needs a generator of latents with its autoencoder; set pool.store=png")
        if vae is not None and shape.in_channels != vae.latent_channels:
            raise UserError(
                f"generator '{self.weights.name}' works on {shape.in_channels} channels, autoencoder "
                f"'{self.config.autoencoder}' on {vae.latent_channels}; choose two that belong together"
            )
        if vae is not None and self.config.sampling.clip:
            raise UserError("sampling.clip=true clamps pixels and would spoil latents; set sampling.clip=false")
        if (data.size, data.channels) != (size, channels):
            raise UserError(
                f"generator '{self.weights.name}' makes {channels}×{size}×{size} images; "
                f"set data.channels={channels} and data.size={size}, or choose another generator"
            )
        if self.phi_shape.channels != data.channels:
            raise UserError(
                f"encoder '{self.config.encoder}' takes {self.phi_shape.channels} channels but data.channels={data.channels}; "
                "choose an encoder trained on such images"
            )
