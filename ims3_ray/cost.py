"""What a run costs before it is run: floating-point operations (2 per multiply-add) of each stage."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from ims3_ray.config import FinetuneConfig, InstabilityConfig, ProtocolConfig, RefineConfig, SamplingConfig
from ims3_ray.models.autoencoder import Autoencoder
from ims3_ray.models.dit import DiTConfig
from ims3_ray.models.encoder import Encoder, EncoderConfig
from ims3_ray.models.students import forward_flops as student_flops


def sampling_flops(shape: DiTConfig, sampling: SamplingConfig) -> float:
    """One image: one forward per step, two where guidance acts."""
    low, high = sampling.cfg_interval
    share = sampling.inverted_gaussian.until if sampling.inverted_gaussian.groups else 1.0
    return share * sampling.steps * (1 + (high - low if sampling.cfg_scale > 1 else 0)) * shape.forward_flops()


def finetune_flops(shape: DiTConfig, config: FinetuneConfig) -> float:
    """One image. A backward pass costs one forward for the gradients of activations and, if weights are trained, one more."""
    objectives, backward = config.objectives, 1 if config.parameters == "difffit" else 2
    passes = 1 + backward if objectives.diffusion.weight or objectives.couple_samples else 0
    if objectives.inversion_matching.weight:
        passes += objectives.inversion_matching.n_steps + backward * objectives.inversion_matching.grad_steps
    if objectives.inversion_matching_released.weight:
        passes += 1
    return float(passes * shape.forward_flops())


def instability_flops(shape: DiTConfig, config: InstabilityConfig) -> float:
    """One image before and after: inversion, sampling, and the derivatives (a forward-mode one costs two passes)."""
    values = shape.in_channels * shape.input_size**2
    derivatives = values if values <= config.exact_up_to else 4 * config.probes * config.lanczos_steps
    return 2 * config.steps * (4 + derivatives) * shape.forward_flops()


def inversion_flops(shape: DiTConfig, sampling: SamplingConfig) -> float:
    """One real image, inverted to where samples start from."""
    return sampling_flops(shape, sampling)


def refine_flops(shape: DiTConfig, config: RefineConfig) -> float:
    """One image: a forward and the gradient of its input at each step."""
    return 2.0 * config.steps * shape.forward_flops()


def evaluation_flops(
    protocol: ProtocolConfig, student: str, channels: int, size: int, classes: int, trained: int, tested: int
) -> float:
    """One student: three forwards per training image of all epochs, one per test image and validation; no teacher."""
    forward = student_flops(student, channels, size, classes, protocol.norm, protocol.width)
    return forward * (3 * trained + protocol.validations * tested)


def encoding_flops(autoencoder: Autoencoder, size: int) -> float:
    """One image to its latents, counted on a model without weights."""
    with FlopCounterMode(display=False) as counter:
        autoencoder.moments(torch.zeros(1, autoencoder.image_channels, size, size, device="meta"))
    return float(counter.get_total_flops())


def decoding_flops(autoencoder: Autoencoder, size: int) -> float:
    """One image from its latents of ``size`` × ``size``, counted on a model without weights."""
    with FlopCounterMode(display=False) as counter:
        autoencoder.decode(torch.zeros(1, autoencoder.latent_channels, size, size, device="meta"))
    return float(counter.get_total_flops())


def embedding_flops(shape: EncoderConfig, size: int) -> float:
    """φ of one image, counted on a model without weights."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Encoder(shape).eval()(torch.zeros(1, shape.channels, size, size))
    return float(counter.get_total_flops())


def embedding_dim(shape: EncoderConfig) -> int:
    """Features that φ gives of an image."""
    with torch.device("meta"):
        return Encoder(shape).dim
