"""DiffFit: what is trained, how much of it, and that merging keeps the function."""

from __future__ import annotations

import pytest
import torch

from ims3_ray.models.difffit import add_difffit, merge_adapter
from ims3_ray.models.dit import DiT, DiTConfig
from tests.conftest import adapter_of

CONFIG = DiTConfig(
    input_size=4, in_channels=2, patch_size=2, hidden_size=16, depth=3, num_heads=2, num_classes=3, learn_sigma=True
)
XL2 = DiTConfig(
    input_size=32, in_channels=4, patch_size=2, hidden_size=1152, depth=28, num_heads=16, num_classes=1000, learn_sigma=True
)


def randomised(model: DiT, seed: int, trained_only: bool = False) -> DiT:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad or not trained_only:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.double()


def outputs(model: DiT) -> torch.Tensor:
    z = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    with torch.no_grad():
        return model(z, torch.tensor([0, 500, 999]), torch.tensor([0, 2, 3]))


def test_adding_difffit_does_not_change_the_function():
    model = randomised(DiT(CONFIG), 0)
    before = outputs(model)
    add_difffit(model, scaled_blocks=2)
    assert before.abs().max() > 0.1
    assert torch.equal(outputs(model), before)


def test_only_biases_norms_gammas_and_the_label_table_are_trained():
    model = DiT(CONFIG)
    plain = {name for name, _ in model.named_parameters()}
    trained = add_difffit(model, scaled_blocks=2)
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad]
    expected = {name for name in plain if name.endswith(".bias")} | {"y_embedder.embedding_table.weight"}
    expected |= {f"blocks.{i}.{part}.gamma" for i in (0, 1) for part in ("attn.qkv", "attn.proj", "attn", "mlp")}
    assert set(trained) == expected


def test_every_gamma_has_the_width_of_what_it_scales():
    model = DiT(CONFIG)
    add_difffit(model, scaled_blocks=1)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name.endswith("gamma")}
    assert shapes == {
        "blocks.0.attn.qkv.gamma": (48,),
        "blocks.0.attn.proj.gamma": (16,),
        "blocks.0.attn.gamma": (16,),
        "blocks.0.mlp.gamma": (16,),
    }


def test_xl2_trains_1_74_million_parameters():
    with torch.device("meta"):
        model = DiT(XL2)
    add_difffit(model, scaled_blocks=14)
    counts = {"bias": 0, "y_embed": 0, "gamma": 0}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[next(kind for kind in counts if kind in name)] += parameter.numel()
    assert counts == {"bias": 489_632, "y_embed": 1_153_152, "gamma": 96_768}
    assert sum(counts.values()) == 1_739_552
    assert all(p.is_meta for p in model.parameters())


def test_every_gamma_scales_its_output():
    model = randomised(DiT(CONFIG), 1)
    add_difffit(model, scaled_blocks=3)
    before = outputs(model)
    for name, parameter in list(model.named_parameters()):
        if name.endswith("gamma"):
            with torch.no_grad():
                parameter.mul_(1.5)
                assert not torch.allclose(outputs(model), before), name
                parameter.div_(1.5)


@pytest.mark.parametrize("scaled_blocks", [0, 1, 3])
def test_a_merged_adapter_computes_the_fine_tuned_function(scaled_blocks: int):
    tuned, plain = (randomised(DiT(CONFIG), 2) for _ in range(2))
    before = outputs(plain)
    add_difffit(tuned, scaled_blocks)
    randomised(tuned, 3, trained_only=True)
    names = set(plain.state_dict())
    merge_adapter(plain, adapter_of(tuned))
    torch.testing.assert_close(outputs(plain), outputs(tuned), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(outputs(plain), before)
    assert set(plain.state_dict()) == names


def test_the_adapter_is_a_copy_of_what_is_trained():
    model = DiT(CONFIG)
    trained = add_difffit(model, scaled_blocks=1)
    adapter = adapter_of(model)
    assert list(adapter) == trained
    with torch.no_grad():
        model.get_parameter("blocks.0.mlp.gamma").fill_(5)
    assert torch.equal(adapter["blocks.0.mlp.gamma"], torch.ones(16))
    assert not any(tensor.requires_grad for tensor in adapter.values())


def test_a_half_precision_model_still_runs():
    model = DiT(CONFIG).bfloat16()
    add_difffit(model, scaled_blocks=1)
    out = model(torch.zeros(1, 2, 4, 4, dtype=torch.bfloat16), torch.tensor([5]), torch.tensor([0]))
    assert out.dtype == torch.bfloat16
