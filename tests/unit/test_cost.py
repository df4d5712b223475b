"""Floating-point operations of fine-tuning, in forward passes a sample."""

from __future__ import annotations

from typing import Any

import pytest

from ims3_ray.config import FinetuneConfig, SamplingConfig
from ims3_ray.models.dit import PUBLISHED
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.stages.candidates import sampling_flops
from ims3_ray.training.finetuning import finetune_flops

XL = DiTGenerator.of_shape(PUBLISHED["XL"])
DIFFUSION, NONE = {"diffusion": {"weight": 1}}, {"diffusion": {"weight": 0}}


def matching(n_steps: int, grad_steps: int) -> dict[str, Any]:
    return {"inversion_matching": {"weight": 0.002, "n_steps": n_steps, "grad_steps": grad_steps}}


@pytest.mark.parametrize(
    ("objectives", "parameters", "passes"),
    [
        (DIFFUSION | {"inversion_matching": {"weight": 0}}, "difffit", 2),
        (DIFFUSION | {"inversion_matching": {"weight": 0}}, "all", 3),
        (DIFFUSION | matching(2, 1), "difffit", 5),
        (DIFFUSION | matching(10, 1), "difffit", 13),
        (DIFFUSION | matching(5, 5), "difffit", 12),
        (NONE | matching(2, 1), "difffit", 3),
        (DIFFUSION | {"inversion_matching": {"weight": 0}, "inversion_matching_released": {"weight": 1}}, "difffit", 3),
    ],
)
def test_a_sample_costs_so_many_passes(objectives: dict[str, Any], parameters: str, passes: int):
    config = FinetuneConfig.model_validate({"objectives": objectives, "parameters": parameters})
    assert finetune_flops(XL, config) == passes * PUBLISHED["XL"].forward_flops()
    assert PUBLISHED["XL"].forward_flops() == pytest.approx(237.3e9, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "passes"), [({}, 100), ({"cfg_scale": 1.0}, 50), ({"cfg_interval": (0.2, 0.7)}, 75), ({"steps": 20}, 40)]
)
def test_guidance_costs_a_second_pass_where_it_acts(changes: dict[str, Any], passes: float):
    sampling = SamplingConfig.model_validate({"steps": 50, "cfg_scale": 4.0, **changes})
    assert sampling_flops(XL, sampling) == pytest.approx(passes * PUBLISHED["XL"].forward_flops())
