"""The kinds of weights that `ims3 pretrain` trains."""

from __future__ import annotations

from ims3_ray.config import PretrainConfig
from ims3_ray.engine.inputs import Data
from ims3_ray.engine.weights import Weights
from ims3_ray.models.autoencoder import KIND, autoencoder_path
from ims3_ray.pretraining.autoencoder import AutoencoderTarget
from ims3_ray.pretraining.base import Target
from ims3_ray.pretraining.encoder import EncoderTarget
from ims3_ray.pretraining.generator import GeneratorTarget

TARGETS: dict[str, type[Target]] = {each.name: each for each in (GeneratorTarget, EncoderTarget, AutoencoderTarget)}


def target_of(config: PretrainConfig, data: Data) -> Target:
    """The training that a config asks for. Raises :class:`UserError` for settings that do not fit the data."""
    weights = {KIND: Weights.of(autoencoder_path, config.autoencoder)} if config.autoencoder is not None else {}
    target = TARGETS[config.target](config, len(data.classes.names), sum(data.classes.counts), weights)
    target.check()
    return target
