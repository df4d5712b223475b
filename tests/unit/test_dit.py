"""The DiT against diffusers' DiTTransformer2DModel with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.generator import load_generator

CONFIG = DiTConfig(
    input_size=8, in_channels=4, patch_size=2, hidden_size=32, depth=2, num_heads=4, num_classes=6, learn_sigma=True
)


def randomised(config: DiTConfig) -> DiT:
    torch.manual_seed(0)
    model = DiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # the zero-initialised gates would hide every difference
    return model.double()


def as_diffusers(model: DiT) -> torch.nn.Module:
    from diffusers import DiTTransformer2DModel

    c = model.config
    theirs = DiTTransformer2DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.hidden_size // c.num_heads,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        num_layers=c.depth,
        sample_size=c.input_size,
        patch_size=c.patch_size,
        num_embeds_ada_norm=c.num_classes,
    ).double()
    ours = model.state_dict()
    state = {
        "pos_embed.proj.weight": ours["x_embedder.proj.weight"],
        "pos_embed.proj.bias": ours["x_embedder.proj.bias"],
        "proj_out_1.weight": ours["final_layer.adaLN_modulation.1.weight"],
        "proj_out_1.bias": ours["final_layer.adaLN_modulation.1.bias"],
        "proj_out_2.weight": ours["final_layer.linear.weight"],
        "proj_out_2.bias": ours["final_layer.linear.bias"],
    }
    for i in range(c.depth):
        a, b = f"blocks.{i}.", f"transformer_blocks.{i}."
        for kind in ("weight", "bias"):
            for name, part in zip("qkv", ours[f"{a}attn.qkv.{kind}"].chunk(3), strict=True):
                state[f"{b}attn1.to_{name}.{kind}"] = part
            state[f"{b}attn1.to_out.0.{kind}"] = ours[f"{a}attn.proj.{kind}"]
            state[f"{b}ff.net.0.proj.{kind}"] = ours[f"{a}mlp.fc1.{kind}"]
            state[f"{b}ff.net.2.{kind}"] = ours[f"{a}mlp.fc2.{kind}"]
            state[f"{b}norm1.linear.{kind}"] = ours[f"{a}adaLN_modulation.1.{kind}"]
            state[f"{b}norm1.emb.timestep_embedder.linear_1.{kind}"] = ours[f"t_embedder.mlp.0.{kind}"]
            state[f"{b}norm1.emb.timestep_embedder.linear_2.{kind}"] = ours[f"t_embedder.mlp.2.{kind}"]
        state[f"{b}norm1.emb.class_embedder.embedding_table.weight"] = ours["y_embedder.embedding_table.weight"]
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("pos_embed.pos_embed" in name for name in missing)
    for block in theirs.transformer_blocks:
        # diffusers spaces the 128 time frequencies over 127 steps, the DiT release (and so its weights) over 128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return theirs.eval()


def test_forward_equals_diffusers():
    model = randomised(CONFIG).eval()
    z = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 5, 6])
    with torch.no_grad():
        expected = as_diffusers(model)(z, timestep=t, class_labels=y).sample
        actual = model(z, t, y)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_fresh_model_predicts_zero_and_ignores_its_condition():
    model = DiT(CONFIG)
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert out.shape == (2, 8, 8, 8)
    assert out.abs().max() == 0


def test_flops_match_torch_counter():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = DiT(CONFIG)
    # the CPU's fused attention is unknown to the counter, so it is made to see plain matrix products
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, 4, 8, 8), torch.tensor([1]), torch.tensor([0]))
    assert CONFIG.forward_flops() == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_xl2_costs_what_torch_counts():
    xl = DiTConfig(
        input_size=32, in_channels=4, patch_size=2, hidden_size=1152, depth=28, num_heads=16, num_classes=1000, learn_sigma=True
    )
    assert xl.forward_flops() / 1e9 == pytest.approx(237.3, rel=0.01)


def test_an_impossible_shape_is_refused():
    with pytest.raises(ValueError, match="not a multiple of patch_size"):
        DiTConfig(input_size=28, in_channels=1, patch_size=5, hidden_size=32, depth=1, num_heads=4, num_classes=2)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_a_batch_that_share_a_condition_give_what_each_sample_alone_does(parts: int):
    model = randomised(CONFIG)
    z = torch.randn(4, 4, 8, 8, dtype=torch.float64)
    t, y = torch.tensor([10, 500, 900, 3])[:parts], torch.tensor([4, 0, 5, 2])[:parts]
    apart = torch.cat([model(z[b : b + 1], t[b * parts // 4, None], y[b * parts // 4, None]) for b in range(4)])
    torch.testing.assert_close(model(z, t, y), apart, rtol=1e-10, atol=1e-10)


def test_a_model_in_bfloat16_takes_float32_and_stays_near(tiny_world: Path):
    model = load_generator(tiny_world / "dit.safetensors")
    z, t, y = torch.randn(3, 1, 8, 8), torch.tensor([5, 400, 990]), torch.tensor([0, 1, 3])
    with torch.no_grad():
        exact = model(z, t, y)
        rounded = model.to(torch.bfloat16)(z, t, y)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
