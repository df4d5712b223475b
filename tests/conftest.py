"""A tiny world shared by the tests that run stages: three classes of 8×8 images, a DiT and a φ with random weights."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ims3_ray  # noqa: F401 - before diffusers, whose import of torchvision it makes possible on machines without CUDA

CLASSES = ("left", "right", "middle")


def draw(label: int, rng: np.random.Generator) -> np.ndarray:
    """A bright bar on the side that the class is named after, in noise."""
    image = rng.integers(0, 60, (8, 8))
    start = (0, 5, 3)[label]
    image[:, start : start + 3] += 150
    return image.astype(np.uint8)


def write_idx_split(folder: Path, prefix: str, per_class: int, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(CLASSES)), per_class).astype(np.uint8)
    images = np.stack([draw(int(label), rng) for label in labels])
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">HBB3I", 0, 8, 3, *images.shape) + images.tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">HBBI", 0, 8, 1, len(labels)) + labels.tobytes())
    (folder / "classes.txt").write_text("\n".join(CLASSES))


def write_tiny_weights(folder: Path, seed: int = 0, channels: int = 1, classes: tuple[str, ...] = CLASSES) -> None:
    from ims3_ray.config import canonical
    from ims3_ray.models.checkpoints import pack
    from ims3_ray.models.dit import DiT, DiTConfig
    from ims3_ray.models.encoder import Encoder, EncoderConfig

    torch.manual_seed(seed)
    shape = DiTConfig(
        input_size=8, in_channels=channels, patch_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=len(classes)
    )  # fmt: skip
    generator = DiT(shape)
    with torch.no_grad():  # a fresh DiT predicts zero noise: give its zero-initialised layers something to say
        for parameter in generator.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    (folder / "dit.safetensors").write_bytes(pack(generator, canonical(shape), "dit", classes="\n".join(classes)))
    phi_shape = EncoderConfig(
        model="resnet18", model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, channels=channels,
        num_classes=len(classes), mean=-0.5, std=0.5,
    )  # fmt: skip
    (folder / "phi.safetensors").write_bytes(
        pack(Encoder(phi_shape), canonical(phi_shape), "encoder", classes="\n".join(classes))
    )


def write_latent_world(folder: Path, seed: int = 0) -> None:
    """An autoencoder (``vae/``: 8×8×1 images, 4×4×2 latents) and a ``dit.safetensors`` of its latents, random weights."""
    from diffusers import AutoencoderKL

    from ims3_ray.models.dit import DiT, DiTConfig
    from ims3_ray.models.dit_files import write_dit

    torch.manual_seed(seed)
    AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 16), norm_num_groups=4, sample_size=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    shape = DiTConfig(
        input_size=4, in_channels=2, patch_size=2, hidden_size=32, depth=2, num_heads=2, num_classes=len(CLASSES),
        learn_sigma=True,
    )  # fmt: skip
    generator = DiT(shape)
    with torch.no_grad():
        for parameter in generator.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    write_dit(generator, CLASSES, folder / "dit.safetensors")


def adapter_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What is trained of a model."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data/`` (IDX), ``dit.safetensors`` and ``phi.safetensors``. Copy what a test changes."""
    folder = tmp_path_factory.mktemp("world")
    write_idx_split(folder / "data", "train", 30, seed=1)
    write_idx_split(folder / "data", "t10k", 10, seed=2)
    write_tiny_weights(folder)
    return folder


def tiny_values(world: Path, storage: Path, **changes: Any) -> dict[str, Any]:
    """Config values of a run that takes seconds; ``changes`` replace whole sections or top-level values."""
    values: dict[str, Any] = {
        "name": "tiny",
        "storage": str(storage),
        "data": {"path": str(world / "data"), "size": 8, "unit_size": 12},
        "generator": str(world / "dit.safetensors"),
        "encoder": str(world / "phi.safetensors"),
        "finetune": {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "trainer": {"num_workers": 1}},
        "sampling": {"steps": 3, "unit_size": 4},
        "actors": {"count": 1},
        "selection": {"images_per_class": 2, "groups": 3},
        "instability": {"images": 4, "steps": 3, "exact_up_to": 32},
        "quality": {"stop_below": 0, "warn_below": 0},
        "evaluation": {
            "protocols": {"hard": {"width": 8, "epochs": 4, "validations": 2}},
            "seeds": [0, 1],
            "val_per_class": 5,
        },
    }
    for key, change in changes.items():
        values[key] = {**values[key], **change} if isinstance(change, dict) and isinstance(values.get(key), dict) else change
    return values
