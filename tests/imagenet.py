"""A stand-in for ImageNet and the weights that its configs name: the same formats and class labels, tiny and random."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file


def write_images(folder: Path, wnids: Sequence[str], per_class: int) -> None:
    """``train/`` and ``val/`` with one folder per class; every class has a colour of its own."""
    for split, count in (("train", per_class), ("val", 1)):
        rng = np.random.default_rng([count, len(split)])
        for wnid in wnids:
            place = folder / split / wnid
            place.mkdir(parents=True)
            for number in range(count):
                buffer = io.BytesIO()
                colour = np.random.default_rng(int(wnid[1:])).integers(0, 200, 3)
                Image.fromarray((colour + rng.integers(0, 50, (40, 48, 3))).astype(np.uint8)).save(buffer, "PNG")
                (place / f"{wnid}_{number}.PNG").write_bytes(buffer.getvalue())


def places(world: Path) -> list[str]:
    """Overrides that name what :func:`write_images` left in ``images`` and :func:`write_weights` in ``world``."""
    named = {"data.path": "images", "generator": "dit", "autoencoder": "vae", "encoder": "phi", "storage": "runs"}
    return [f"{key}={world}/{name}" for key, name in named.items()]


def as_on_the_hub(pipeline: Path) -> None:
    """Rewrite a DiT pipeline's configs as facebook/DiT-XL-2-256 has them: saved before DiT had a class of its own in diffusers,
    with ImageNet's classes in English."""
    config = json.loads((pipeline / "transformer" / "config.json").read_text())
    older = {
        "_class_name": "Transformer2DModel", "_diffusers_version": "0.12.0.dev0", "cross_attention_dim": None,
        "double_self_attention": False, "dropout": 0.0, "norm_num_groups": 32, "num_vector_embeds": None,
        "only_cross_attention": False, "upcast_attention": False, "use_linear_projection": False,
    }  # fmt: skip
    (pipeline / "transformer" / "config.json").write_text(json.dumps({**config, **older}, indent=2))
    index = {
        "_class_name": "DiTPipeline", "_diffusers_version": "0.12.0.dev0",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "transformer": ["diffusers", "Transformer2DModel"], "vae": ["diffusers", "AutoencoderKL"],
        "id2label": {str(label): f"class {label}, in English" if label else "tench, Tinca tinca" for label in range(1000)},
    }  # fmt: skip
    (pipeline / "model_index.json").write_text(json.dumps(index, indent=2))


def write_weights(folder: Path) -> None:
    """A DiT of 1,000 classes on 32×32×4 latents and an autoencoder as diffusers saves them, φ as timm does."""
    import timm
    from diffusers import AutoencoderKL

    from ims3_ray.models.dit import DiT, DiTConfig
    from ims3_ray.models.dit_files import write_dit

    torch.manual_seed(0)
    shape = DiTConfig(
        input_size=32, in_channels=4, patch_size=8, hidden_size=32, depth=2, num_heads=2, num_classes=1000, learn_sigma=True
    )
    generator = DiT(shape)
    with torch.no_grad():
        for parameter in generator.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    write_dit(generator, (), folder / "dit")
    as_on_the_hub(folder / "dit")
    AutoencoderKL(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), norm_num_groups=2, layers_per_block=1, sample_size=256,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ).save_pretrained(folder / "vae")  # fmt: skip
    arguments = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
    (folder / "phi").mkdir()
    save_file(timm.create_model("resnet18", num_classes=1000, **arguments).state_dict(), folder / "phi" / "model.safetensors")
    data = {"input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    plain = {"architecture": "resnet18", "num_classes": 1000, "model_args": arguments, "pretrained_cfg": data}
    (folder / "phi" / "config.json").write_text(json.dumps(plain))
