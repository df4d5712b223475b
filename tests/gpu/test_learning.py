"""Fine-tuning, students, the encoder and selection on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ims3_ray.config import FinetuneConfig, ProtocolConfig
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.encoder import load_encoder
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.seeds import generator_for
from ims3_ray.selection import path, select_subgroups
from ims3_ray.training.finetuning import BuildEngine, Finetuner, TorchEngine
from ims3_ray.training.students import Training, train_student
from tests.gpu.conftest import distance

SHAPE = DiTConfig(
    input_size=8, in_channels=2, patch_size=2, hidden_size=64, depth=3, num_heads=4, num_classes=4, learn_sigma=True
)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "diffusion": {"inversion_matching": {"weight": 0}},
    "diffusion with variance": {"diffusion": {"variance": True}, "inversion_matching": {"weight": 0}},
    "inversion matching": {"inversion_matching": {"weight": 0.1, "n_steps": 3, "grad_steps": 2}},
    "as released": {"inversion_matching": {"weight": 0}, "inversion_matching_released": {"weight": 0.1}},
    "minimax": {"inversion_matching": {"weight": 0}, "minimax": {"representativeness": 0.1, "diversity": 0.1}},
}


def tuner(device: str, build_engine: BuildEngine = TorchEngine, **settings: Any) -> Finetuner:
    torch.manual_seed(0)
    model = DiT(SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    values = {"batch_size": 8, "scaled_blocks": 2, "trainer": {"num_workers": 1}, **settings}
    return Finetuner(
        model, DiTGenerator.of_shape(SHAPE), FinetuneConfig.model_validate(values), device, build_engine=build_engine
    )


def latents() -> CleanImages:
    rng = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(16, 1, 2, 8, 8, generator=rng) for name in ("mean", "log_variance")}
    return CleanImages(tensors, torch.arange(16) % 4, flip=False)


def steps(tuner: Finetuner, numbers: range = range(4)) -> list[dict[str, float]]:
    return [tuner.step(tuner.draw(latents(), torch.arange(8) + number, generator_for(0, "test", number))) for number in numbers]


def assert_near(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    for row, wanted in zip(found, expected, strict=True):
        assert row == pytest.approx(wanted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_fine_tuning_learns_what_it_learns_on_the_cpu(device: str, name: str):
    found, expected = tuner(device, objectives=OBJECTIVES[name]), tuner("cpu", objectives=OBJECTIVES[name])
    assert_near(steps(found), steps(expected), 1e-3)
    there, here = (load(each.adapter()) for each in (found, expected))
    assert max(distance(there[key], here[key]) for key in here if here[key].any()) < 1e-3


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"activation_checkpointing": True}, {"parameters": "all"}], ids=str)
def test_fine_tuning_by_other_ways_does_too(device: str, settings: dict[str, Any]):
    assert_near(steps(tuner(device, **settings)), steps(tuner("cpu", **settings)), 1e-3)


def test_fine_tuning_in_bfloat16_is_near_float32(device: str):
    found = tuner(device, precision="bf16")
    assert_near(steps(found), steps(tuner("cpu")), 0.1)
    frozen = {p.dtype for p in found.engine.module.parameters() if not p.requires_grad}
    assert (frozen, {p.dtype for _, p in found.trained}) == ({torch.bfloat16}, {torch.float32})


@pytest.mark.cuda_only
def test_compiled_fine_tuning_computes_the_same(device: str):
    assert_near(steps(tuner(device, compile=True)), steps(tuner(device)), 1e-3)


def test_fine_tuning_goes_on_from_what_it_saved(device: str, tmp_path: Path):
    whole, first, second = (tuner(device) for _ in range(3))
    expected = steps(whole)
    found = steps(first, range(2))
    first.save(tmp_path)
    second.load(tmp_path)
    assert_near([*found, *steps(second, range(2, 4))], expected, 1e-4)


@pytest.mark.cuda_only
def test_deepspeed_learns_what_pytorch_alone_does(device: str, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("deepspeed")
    from ims3_ray.stages.zero import ZeroEngine

    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}
    for key, value in {**group, "DS_BUILD_OPS": "0"}.items():
        monkeypatch.setenv(key, value)
    for precision in ("fp32", "bf16"):
        found, expected = (steps(tuner(device, engine, precision=precision)) for engine in (ZeroEngine, TorchEngine))
        assert_near(found, expected, 1e-3 if precision == "fp32" else 0.05)


def real(count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(2)
    labels = torch.arange(count) % 3
    pixels = torch.randint(60, (count, 3, size, size), generator=rng)
    for label in range(3):
        pixels[labels == label, :, :, label * size // 3 : (label + 1) * size // 3] += 150
    return pixels.to(torch.uint8), labels


def coloured(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of three classes that differ in colour, so that no mirroring, cropping or shuffling of patches hides the class."""
    pixels, labels = torch.randint(60, (count, 3, 16, 16), generator=torch.Generator().manual_seed(2)), torch.arange(count) % 3
    pixels[torch.arange(count), labels] += 150
    return pixels.to(torch.uint8), labels


@pytest.mark.parametrize(
    ("name", "size", "lr"), [("convnet-3", 16, 0.005), ("resnetap-10", 16, 0.005), ("resnet-18", 64, 0.001)]
)
def test_a_student_learns_what_it_learns_on_the_cpu(device: str, name: str, size: int, lr: float):
    # Augmentation draws on the device, whose random numbers are others; CutMix draws on the CPU. With images smaller than 64
    # pixels the last layers of resnet-18 see few pixels, and their batch norm magnifies rounding errors to 3 % of the loss.
    values = {"width": 16, "epochs": 3, "batch_size": 8, "augment": {}, "cutmix": True, "lr": lr}
    losses = {}
    for on in (device, "cpu"):
        training = Training(name, real(24, size), 3, ProtocolConfig.model_validate(values), 0, on)
        losses[on] = [training.epoch().item() for _ in range(3)]
    assert losses[device] == pytest.approx(losses["cpu"], rel=1e-2)
    assert losses["cpu"][2] != pytest.approx(losses["cpu"][0], rel=0.015), "the weights have moved"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_student_with_every_augmentation_is_trained_and_tested(device: str, precision: str):
    augment = {"crop": (0.7, 1.0), "flip": True, "jitter": 0.2, "lighting": 0.1, "max_shift": 1, "shuffle_patches": 2}
    values = {"width": 16, "epochs": 30, "augment": augment, "validations": 2, "precision": precision}
    protocol = ProtocolConfig.model_validate(values)
    student, accuracy = train_student("convnet-3", coloured(30), coloured(60), 3, protocol, 0, device=device)
    assert accuracy.last > 80
    assert next(student.parameters()).device.type == device


def test_features_are_those_of_the_cpu(tiny_world: Path, device: str):
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1
    encoder = load_encoder(tiny_world / "phi.safetensors")
    expected = encoder(images)
    assert distance(encoder.to(device)(images.to(device)), expected) < 1e-4


@pytest.mark.parametrize("coupling", ["pool", "selected"])
def test_subgroups_are_selected_as_on_the_cpu(device: str, coupling: Any):
    rng = torch.Generator().manual_seed(4)
    references = torch.rand(12, 32, generator=rng)
    candidates = references[:, None] + 0.3 * torch.randn(12, 6, 32, generator=rng)
    found, expected = (
        select_subgroups(candidates.to(on), references.to(on), alpha=0.4, beta=0.9, coupling=coupling) for on in (device, "cpu")
    )
    assert found.groups.tolist() == expected.groups.tolist()
    assert found.objective == pytest.approx(expected.objective, rel=1e-9)
    assert distance(found.score_CG, expected.score_CG) < 1e-9
    assert torch.equal(*(path(candidates.to(on), references.to(on)).groups.cpu() for on in (device, "cpu")))
