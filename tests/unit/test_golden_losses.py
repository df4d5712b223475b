"""The losses of a small fixed fine-tuning, as they have been: a change of any formula on the way shows here.

A change that is meant writes them anew: ``python -m tests.unit.test_golden_losses``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ims3_ray.config import FinetuneConfig
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.seeds import generator_for
from ims3_ray.training.finetuning import Finetuner

RECORD = Path(__file__).with_name("golden_losses.json")
SHAPE = DiTConfig(
    input_size=8, in_channels=2, patch_size=4, hidden_size=32, depth=2, num_heads=2, num_classes=3, learn_sigma=True
)
TUNING: dict[str, dict[str, Any]] = {
    "as the paper prints it": {},
    "as released": {"objectives": {"inversion_matching": {"weight": 0}, "inversion_matching_released": {"weight": 0.5}}},
    "everything": {
        "parameters": "all", "weight_decay": 0.1, "flip": True,
        "objectives": {
            "diffusion": {"variance": True}, "inversion_matching": {"weight": 0.3, "n_steps": 3, "grad_steps": 2},
            "minimax": {"representativeness": 0.1, "diversity": 0.1, "memory": 6},
        },
    },
}  # fmt: skip
STEPS = 8


def losses(name: str) -> list[dict[str, float]]:
    torch.manual_seed(3)
    model, rng = DiT(SHAPE), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    tuning = FinetuneConfig.model_validate({"batch_size": 6, "lr": 5e-3, "trainer": {"num_workers": 1}, **TUNING[name]})
    tuner = Finetuner(model, DiTGenerator.of_shape(SHAPE), tuning, "cpu")
    moments = {key: 0.5 * torch.randn(18, 2, 2, 8, 8, generator=rng) for key in ("mean", "log_variance")}
    images = CleanImages(moments, torch.arange(18) % 3, tuning.flip)
    batches = [torch.arange(6) + 3 * step % 12 for step in range(STEPS)]
    return [tuner.step(tuner.draw(images, index, generator_for(0, "golden", step))) for step, index in enumerate(batches)]


@pytest.mark.parametrize("name", TUNING)
def test_losses_are_those_on_record(name: str):
    recorded = json.loads(RECORD.read_text())[name]
    assert len(recorded) == STEPS
    for step, (found, expected) in enumerate(zip(losses(name), recorded, strict=True)):
        # Other processors round otherwise, and steps carry that on.
        assert found == pytest.approx(expected, rel=2e-3, abs=2e-4), f"step {step}"


def test_the_record_would_show_another_schedule(monkeypatch: pytest.MonkeyPatch):
    """That the tolerance is fine enough: a hundredth more noise is seen."""
    from ims3_ray.diffusion.schedule import NoiseSchedule

    monkeypatch.setattr("ims3_ray.models.generators.dit.NoiseSchedule", lambda: NoiseSchedule(beta_end=0.0202))
    recorded = json.loads(RECORD.read_text())["as the paper prints it"]
    assert losses("as the paper prints it") != [pytest.approx(row, rel=2e-3, abs=2e-4) for row in recorded]


if __name__ == "__main__":
    RECORD.write_text(json.dumps({name: losses(name) for name in TUNING}, indent=1) + "\n")
