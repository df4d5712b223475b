"""The inputs of a run: data, weights and classes. They are checked when they are opened."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from ims3_ray import plugins
from ims3_ray.config import DataConfig, PretrainConfig, RunConfig, WorkConfig
from ims3_ray.config.work import Split
from ims3_ray.data.batches import load_pixels
from ims3_ray.data.captions import Captions
from ims3_ray.data.classes import ClassTable, chosen_labels, count_images
from ims3_ray.data.prompts import prompts_of
from ims3_ray.data.sources import Source, check_apart, copies_noticed, open_source
from ims3_ray.data.sources.folder import check_classes_are_no_splits
from ims3_ray.engine.weights import Weights
from ims3_ray.errors import UserError
from ims3_ray.models.autoencoder import Autoencoder, autoencoder_path, empty_autoencoder, trained_on
from ims3_ray.models.encoder import EncoderConfig, check_encoder, encoder_config, encoder_path
from ims3_ray.models.generator import generator_files, generator_path, open_generator
from ims3_ray.models.generators.base import Generator
from ims3_ray.training.encoder import Images


class Data:
    """The opened training and test split, and the classes that are distilled. Raises :class:`UserError`."""

    def __init__(self, config: WorkConfig | PretrainConfig, images_per_class: int = 1) -> None:
        """Every class must have ``images_per_class`` training images."""
        data = config.data
        self.train, self.test = open_source(*data.place("train")), open_source(*data.place("test"))
        self._told = set[str]()
        self.tell([*self.train.notices, *self.test.notices])
        check_classes_are_no_splits(self.train, data.path)
        if data.test_share is None:  # otherwise students would know the answers
            check_apart(self.train, self.test, data.place("test")[0], "test")
        labels = chosen_labels(self.train.class_names, data.classes)
        wanted = set(data.classes or self.train.class_names)
        if missing := (wanted - set(self.test.class_names)) or (set() if data.classes else {*self.test.class_names} - wanted):
            which = "training" if min(missing) in wanted else "test"
            raise UserError(
                f"class '{min(missing)}' is in the {which} split only; give the other split images of it, or list the classes "
                "that both have in data.classes"
            )
        key = getattr(config, "size_key", "selection.images_per_class")
        counts = count_images(self.train.labels, self.train.class_names, labels, images_per_class, key)
        names = tuple(self.train.class_names[label] for label in labels)
        if len(names) < 2:
            raise UserError(
                f"data source '{data.path}' holds one class, '{names[0]}', and students need two to tell apart; if the classes "
                f"are folders in '{names[0]}', put them directly into the folder of their split"
            )
        self.classes = ClassTable(names, tuple(labels), tuple(counts))
        self.tell(copies_noticed(self.train, self.test, "training images", names))
        self._hashes: dict[str, str] = {}

    def tell(self, notices: Iterable[str]) -> None:
        """Print what a user should know of the data and of sets, each sentence once."""
        for notice in notices:
            if notice not in self._told:
                self._told.add(notice)
                print(f"note: {notice}", flush=True)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hash of each split's images. It is computed once per plan, since a split may be a large file or a folder of millions
        of files."""
        return {"train": self.train.fingerprint, "test": self.test.fingerprint}

    def captions_hash(self, reference: str) -> str:
        """A hash of the captions of all training images, computed once per plan. Raises :class:`UserError` if one is
        missing."""
        if reference not in self._hashes:
            wanted = np.flatnonzero(np.isin(self.train.labels, self.classes.source_labels)).tolist()
            texts = Captions(reference, self.train).of(wanted)
            self._hashes[reference] = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
        return self._hashes[reference]

    def params(self, split: Split) -> dict[str, Any]:
        """What the key of an artifact holds of a split: see :func:`source_params`."""
        return source_params(self.train if split == "train" else self.test, self.fingerprints[split])


def source_params(source: Source, fingerprint: str) -> dict[str, Any]:
    """What the key of an artifact holds of a data source with this fingerprint: the version of its reader where that is not
    the first, and the hash of the source code of a plugin's."""
    kind = type(source.unlimited)
    reader = {"reader": kind.version} if kind.version > 1 else {}
    return {"source": fingerprint, **reader, **plugins.hashes(kind)}


class Models:
    """The weights of an arm. Each is located and checked against the data on first access. Raises :class:`UserError`."""

    def __init__(self, config: RunConfig, classes: ClassTable) -> None:
        self.config, self._classes = config, classes

    @cached_property
    def _pretrained(self) -> Generator:
        """The generator's description, without classes that it is taught."""
        generator = open_generator(generator_path(self.config.generator))
        generator.check()
        return generator

    @property
    def known(self) -> tuple[str, ...]:
        """Names of the classes that the generator's weights know."""
        return self._pretrained.names

    @property
    def added(self) -> tuple[str, ...]:
        """Names of the classes that the generator is taught; none if its weights do not name those that they know."""
        if self.config.adopt is None or not self.known:
            return ()
        return tuple(name for name in self._classes.names if name not in self.known)

    @cached_property
    def generator(self) -> Generator:
        """The generator's description, checked against its autoencoder, the size and channels of the data, and the sampling."""
        generator = self._pretrained
        if self.added:
            generator = generator.adopting(self.added)
        if self.told is not None:
            generator = generator.told(**self.told)
        self._check_latents()
        self._check_pixels(generator, self.autoencoder)
        self._check_guidance(generator)
        return generator

    @cached_property
    def told(self) -> dict[str, Any] | None:
        """What a generator that takes words is told: arguments of :meth:`Generator.told`, which the keys of all that it makes
        hold; None for others. Raises :class:`UserError` for words that nobody hears."""
        file, negative = self.config.data.prompts, self.config.sampling.negative_prompt
        if not self._pretrained.takes_words:
            if negative:
                raise UserError(
                    f"generator '{self.config.generator}' is told labels, not words; take sampling.negative_prompt out"
                )
            return None
        names = self._classes.names
        return {"class_names": names, "prompts": prompts_of(names, file), "negative": negative}

    def by_label(self, what: str) -> Generator:
        """The generator, which must be one that is told labels, since ``what`` needs them. Raises :class:`UserError` for one
        that is told words."""
        if self.generator.takes_words:
            raise UserError(
                f"{what} needs a generator that is told the label of a class (a DiT), and '{self.config.generator}' is told "
                "words; name another generator for this arm"
            )
        return self.generator

    @property
    def image_size(self) -> int:
        """Height and width of the images that the generator makes, in pixels."""
        return self.generator.latent[1] * (self.autoencoder.factor if self.autoencoder is not None else 1)

    @property
    def data_at_its_size(self) -> DataConfig:
        """The data at the size of the generator's images."""
        return self.config.data.model_copy(update={"size": self.image_size})

    @cached_property
    def generator_weights(self) -> Weights:
        return Weights.of(generator_path, self.config.generator, generator_files)

    @cached_property
    def labels(self) -> tuple[int, ...]:
        """The generator's label of each class."""
        return tuple(self.generator.labels(self._classes.names))

    @cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The architecture of the autoencoder, without weights; None if there is none."""
        return empty_autoencoder(autoencoder_path(self._autoencoder)) if self._autoencoder else None

    @cached_property
    def autoencoder_weights(self) -> Weights | None:
        return Weights.of(autoencoder_path, self._autoencoder) if self._autoencoder else None

    @property
    def _autoencoder(self) -> str | None:
        """Reference of the autoencoder: the one that the config names, or the one that comes with the generator."""
        own = self.config.generator if self._pretrained.brings_autoencoder else None
        return self.config.autoencoder or own

    @cached_property
    def encoder(self) -> EncoderConfig:
        """The architecture of φ."""
        path, channels = encoder_path(self.config.encoder), self.config.data.channels
        shape = encoder_config(path)
        check_encoder(path)
        if shape.channels != channels:
            raise UserError(
                f"encoder '{self.config.encoder}' takes {shape.channels} channels but data.channels={channels}; "
                "choose an encoder trained on such images"
            )
        return shape

    @cached_property
    def encoder_weights(self) -> Weights:
        return Weights.of(encoder_path, self.config.encoder)

    @property
    def latent_bytes(self) -> float:
        """Bytes of an image's latents in half precision."""
        channels, height, width = self.generator.latent
        return 2.0 * channels * height * width

    def _check_guidance(self, generator: Generator) -> None:
        """Raises :class:`UserError` for settings that need the null condition of a generator that was trained without it."""
        if generator.knows_null:
            return
        needs = {
            "sampling.cfg_scale=1": self.config.sampling.cfg_scale > 1,
            "finetune.label_dropout=0": self.config.finetune.label_dropout > 0
            and any(arm.finetune for arm in self.config.arms.values()),
            "adopt.label_dropout=0": bool(self.added) and self.config.adopt is not None and self.config.adopt.label_dropout > 0,
        }
        if wrong := [fix for fix, needed in needs.items() if needed]:
            raise UserError(
                f"generator '{generator.title}' was trained without label dropout, so it knows only images with a class "
                f"and cannot be guided; set {' '.join(wrong)}"
            )

    def _check_latents(self) -> None:
        """Raises :class:`UserError` if the generator's file says that it was trained on the latents of another autoencoder than
        the given one."""
        path, name = generator_path(self.config.generator), self.config.generator
        trained = trained_on(path)
        if trained is None:
            return
        wanted = f"name the one whose file has a SHA-256 that begins with {trained}"
        if self.autoencoder_weights is None:
            raise UserError(
                f"generator '{name}' was trained on the latents of an autoencoder, and autoencoder is unset; {wanted}"
            )
        if self.autoencoder_weights.digest != trained:
            raise UserError(
                f"generator '{name}' was trained on the latents of another autoencoder than '{self._autoencoder}', whose file "
                f"has {self.autoencoder_weights.digest}; {wanted}"
            )

    def _check_pixels(self, generator: Generator, vae: Autoencoder | None) -> None:
        data, name, (latent_channels, size, _) = self.config.data, self.config.generator, generator.latent
        if vae is None and latent_channels not in (1, 3):
            raise UserError(
                f"generator '{name}' works on {latent_channels}-channel latents; "
                "name their autoencoder, as in autoencoder=stabilityai/sd-vae-ft-ema"
            )
        if vae is None and self.config.pool.store == "latents":
            raise UserError("pool.store=latents needs a generator of latents with its autoencoder; set pool.store=png")
        if vae is not None and latent_channels != vae.latent_channels:
            raise UserError(
                f"generator '{name}' works on {latent_channels} channels, autoencoder '{self._autoencoder}' on "
                f"{vae.latent_channels}; choose two that belong together"
            )
        if vae is not None and self.config.sampling.clip:
            raise UserError("sampling.clip=true clamps pixels and would spoil latents; set sampling.clip=false")
        channels, size = (vae.image_channels, size * vae.factor) if vae else (latent_channels, size)
        sizes = data.size if generator.any_size else size
        if generator.any_size and data.channels != channels:
            raise UserError(f"generator '{name}' makes images of {channels} channels; set data.channels={channels}")
        if (data.size, data.channels) != (sizes, channels):
            raise UserError(
                f"generator '{name}' makes {channels}×{size}×{size} images; "
                f"set data.channels={channels} and data.size={size}, or choose another generator"
            )


def decoded_split(data: DataConfig, split: Split) -> tuple[Images, list[str]]:
    """The images of a split, and the names of those that cannot be decoded and are left out. Classes are in the same order in
    both splits: that of `data.classes`, or else of the training split.

    Raises :class:`UserError` for a class of which no image can be decoded.
    """
    train = open_source(*data.place("train"))
    names = tuple(train.class_names[label] for label in chosen_labels(train.class_names, data.classes))
    source = train if split == "train" else open_source(*data.place("test"))
    pixels, labels, broken = load_pixels(source, data.size, data.channels, names, data.colour)
    for name, count in zip(names, labels.bincount(minlength=len(names)).tolist(), strict=True):
        if count == 0:
            raise UserError(
                f"class '{name}' has no {split} image that can be decoded; replace its files, or leave it out with data.classes"
            )
    return (pixels, labels, names), broken
