"""Students, the feature encoder φ and the weights files that models travel in."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import nn

from ims3_ray.errors import UserError
from ims3_ray.models.checkpoints import load_into, pack, read_metadata, weights_path
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.encoder import Encoder, EncoderConfig, check_encoder, encoder_path, load_encoder
from ims3_ray.models.generator import load_generator, open_generator
from ims3_ray.models.students import AveragePool2, ConvNet

DIT = DiTConfig(input_size=4, in_channels=1, patch_size=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
ENCODER = EncoderConfig(
    model="resnet18",
    model_args={"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    channels=1, num_classes=3, mean=0.1, std=0.7,
)  # fmt: skip
CLASSES = ("Ankle boot", "T-shirt/top", "Trouser")


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def packed_dit(folder: Path) -> Path:
    file = folder / "dit.safetensors"
    file.write_bytes(pack(randomised(DiT(DIT)), DIT.model_dump(), "dit", classes="\n".join(CLASSES)))
    return file


def one_line(raised: pytest.ExceptionInfo[UserError]) -> str:
    message = str(raised.value)
    assert message.strip()
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("size", "expected"), [(224, 754_570), (256, 763_530)])
def test_the_convnet_has_the_parameters_of_the_literature(size: int, expected: int):
    with torch.device("meta"):
        model = ConvNet(in_channels=3, size=size, num_classes=10, width=128, depth=6)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_the_convnet_classifies_images_of_odd_size():
    assert ConvNet(1, 28, 10, width=8, depth=3)(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_a_convnet_too_deep_for_its_images_is_refused():
    with pytest.raises(ValueError, match="at least 64 pixels"):
        ConvNet(1, 32, 10, depth=6)


def test_the_convnet_normalises_each_channel_of_each_image():
    torch.manual_seed(0)
    model = ConvNet(1, 16, 4, width=8, depth=1)
    x = torch.rand(1, 1, 16, 16)
    normalised = model.features[1](model.features[0](x))[0]
    torch.testing.assert_close(normalised.mean((1, 2)), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.var((1, 2), unbiased=False), torch.ones(8), atol=1e-2, rtol=0)


def test_a_loaded_encoder_gives_unit_features_and_is_frozen(tmp_path: Path):
    original = Encoder(ENCODER).eval()
    file = tmp_path / "phi.safetensors"
    file.write_bytes(pack(original, ENCODER.model_dump(mode="json"), "encoder"))
    encoder = load_encoder(file)
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    x = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    features = encoder(x)
    assert features.shape == (3, encoder.dim) == (3, 16)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    with torch.no_grad():
        torch.testing.assert_close(features, original(x))


def test_encoder_features_are_the_normalised_input_of_its_head():
    torch.manual_seed(2)
    encoder = Encoder(ENCODER).eval()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        pooled = encoder.network.forward_features((x - 0.1) / 0.7).mean((2, 3))
        torch.testing.assert_close(encoder(x), pooled / pooled.norm(dim=1, keepdim=True))
        torch.testing.assert_close(encoder.logits(x), pooled @ encoder.network.fc.weight.T + encoder.network.fc.bias)


def timm_folder(folder: Path, **changes: object) -> Path:
    """A network as timm saves it for the hub, random weights."""
    import timm
    from safetensors.torch import save_file

    arguments = {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}
    torch.manual_seed(3)
    network = timm.create_model("resnet18", num_classes=7, **arguments)
    folder.mkdir(exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    data = {"input_size": [3, 64, 64], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3]}
    plain = {"architecture": "resnet18", "num_classes": 7, "model_args": arguments, "pretrained_cfg": data, **changes}
    (folder / "config.json").write_text(json.dumps(plain))
    return folder


def test_an_encoder_as_timm_saves_it_sees_what_timm_shows_it(tmp_path: Path):
    import timm
    from torchvision.transforms import v2

    folder = timm_folder(tmp_path / "phi")
    path = encoder_path(str(folder))
    check_encoder(path)
    encoder = load_encoder(path)
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(4))
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    resize = v2.Resize((64, 64), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    seen = v2.functional.normalize(resize(x), [0.4, 0.5, 0.6], [0.2, 0.25, 0.3])
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(seen), pre_logits=True)
        torch.testing.assert_close(encoder(2 * x - 1), expected / expected.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


FAMILIES = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)},
    "resnet101": {"layers": (1, 1, 2, 1), "channels": (8, 8, 16, 16)},
    "efficientnet_b0": {},
    "vit_base_patch32_clip_224": {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": 64},
    "resnet50_clip": {},
}
"""Architectures of timm that φ is taken from, with arguments that make them small."""


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize("tag", ["", "openai", "openai_ft_in1k"])
def test_every_family_is_read_with_its_own_preprocessing_and_gives_timms_features(architecture: str, tag: str, tmp_path: Path):
    import timm
    from safetensors.torch import save_file
    from torchvision.transforms import v2

    arguments, size = FAMILIES[architecture], 224 if architecture == "resnet50_clip" else 64
    torch.manual_seed(5)
    network = timm.create_model(architecture, num_classes=10, **arguments).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    data = {"input_size": [3, size, size], "mean": mean, "std": std, "interpolation": "bilinear", "crop_pct": 0.9, "tag": tag}
    plain = {"architecture": architecture, "num_classes": 10, "model_args": arguments, "pretrained_cfg": data}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    path = encoder_path(str(tmp_path))
    check_encoder(path)
    encoder = load_encoder(path)
    x = torch.rand(2, 3, 80, 80, generator=torch.Generator().manual_seed(6))
    resize = v2.Resize((size, size), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    with torch.no_grad():
        seen = network.forward_features(v2.functional.normalize(resize(x), mean, std))
        projected = "clip" in architecture and tag != "openai_ft_in1k"
        expected = network.forward_head(seen, pre_logits=not projected)
        features = encoder(2 * x - 1)
    torch.testing.assert_close(features, torch.nn.functional.normalize(expected, dim=1), rtol=1e-3, atol=1e-4)
    assert features.shape == (2, encoder.dim)


def test_encoders_that_cannot_be_are_told_in_a_line(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"without timm's config\.json"):
        encoder_path(str(tmp_path / "empty"))
    for changes, says in (
        ({"architecture": "resnet1800"}, "a network that timm does not build"),
        ({"num_classes": 8}, "'fc.weight' is"),
        ({"pretrained_cfg": {}}, "is none of timm's"),
    ):
        with pytest.raises(UserError, match=says):
            check_encoder(encoder_path(str(timm_folder(tmp_path / "phi", **changes))))
    damaged = encoder_path(str(timm_folder(tmp_path / "phi")))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    for look in (check_encoder, load_encoder):
        with pytest.raises(UserError, match="not a readable safetensors file"):
            look(damaged)


def test_a_packed_generator_comes_back_with_its_weights_and_shape(tmp_path: Path):
    model, loaded = randomised(DiT(DIT)), load_generator(packed_dit(tmp_path))
    assert loaded.config == DIT
    assert not loaded.training
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))


def test_metadata_says_kind_shape_and_classes(tmp_path: Path):
    metadata = read_metadata(packed_dit(tmp_path), "dit")
    assert metadata["kind"] == "dit"
    assert json.loads(metadata["config"]) == DIT.model_dump()
    assert metadata["classes"].split("\n") == list(CLASSES)


def test_a_file_in_half_precision_loads_into_the_precision_of_the_model(tmp_path: Path):
    model, file = randomised(DiT(DIT)), tmp_path / "half.safetensors"
    file.write_bytes(pack(model, DIT.model_dump(), "dit", torch.float16))
    loaded = load_generator(file)
    for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True):
        assert theirs.dtype == torch.float32
        assert torch.equal(theirs, ours.half().float())


def test_packing_in_half_precision_keeps_counters_exact(tmp_path: Path):
    model, loaded = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
    model.num_batches_tracked.fill_(100_003)
    file = tmp_path / "norm.safetensors"
    file.write_bytes(pack(model, {}, "norm", torch.float16))
    load_into(loaded, file)
    assert loaded.num_batches_tracked == 100_003


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda state: state.pop("bias"), "'bias' is missing"),
        (lambda state: state.update(bias=torch.zeros(5)), r"'bias' is \(5,\), needed \(2,\)"),
        (lambda state: state.update(extra=torch.zeros(1)), "'extra' is not part of it"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, change, expected: str):
    state, file = nn.Linear(3, 2).state_dict(), tmp_path / "linear.safetensors"
    change(state)
    file.write_bytes(save(state))
    model = nn.Linear(3, 2)
    before = model.weight.clone()
    with pytest.raises(UserError, match=expected) as raised:
        load_into(model, file)
    assert str(file) in one_line(raised)
    assert torch.equal(model.weight, before)


def test_weights_of_another_kind_are_refused(tmp_path: Path):
    file = packed_dit(tmp_path)
    with pytest.raises(UserError, match="hold a 'dit' where a 'encoder' is needed") as raised:
        load_encoder(file)
    assert str(file) in one_line(raised)


def test_safetensors_without_a_model_shape_are_refused(tmp_path: Path):
    file = tmp_path / "bare.safetensors"
    file.write_bytes(save({"weight": torch.zeros(1)}))
    with pytest.raises(UserError, match="carry no model shape") as raised:
        load_encoder(file)
    one_line(raised)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a pickle, perhaps", b"\xff" * 64])
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, content: bytes):
    file = tmp_path / "dit.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match="not a readable safetensors file") as raised:
        load_generator(file)
    assert str(file) in one_line(raised)


def test_a_cut_off_file_is_refused(tmp_path: Path):
    file = packed_dit(tmp_path)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a readable safetensors file") as raised:
        load_generator(file)
    one_line(raised)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("embedded:nothing", "no weights file of the package is called 'nothing'; there is: fashion-mnist-dit, "),
        ("nowhere/dit.safetensors", "'nowhere/dit.safetensors' do not exist"),
        (".", "'.' do not exist"),
    ],
)
def test_weights_that_do_not_exist_are_refused(reference: str, says: str):
    with pytest.raises(UserError, match=re.escape(says)) as raised:
        weights_path(reference)
    one_line(raised)


def test_weights_are_found_by_path(tmp_path: Path):
    file = packed_dit(tmp_path)
    assert weights_path(str(file)) == file


def test_classes_are_found_by_name_and_not_by_position(tmp_path: Path):
    assert open_generator(packed_dit(tmp_path)).labels(["Trouser", "Ankle boot"]) == [2, 0]


def test_an_unknown_class_is_an_error_that_names_the_nearest(tmp_path: Path):
    with pytest.raises(UserError, match=r"no class 'Trousers'; nearest: Trouser\b") as raised:
        open_generator(packed_dit(tmp_path)).labels(["Ankle boot", "Trousers"])
    assert "dit.safetensors" in one_line(raised)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 7, 9), (1, 1, 2, 3)])
def test_the_pool_of_convnets_is_pytorchs(shape: tuple[int, ...]):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    expected = torch.nn.functional.avg_pool2d(images, 2)
    found = AveragePool2()(images)
    assert torch.allclose(found, expected, rtol=0, atol=1e-15)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = [torch.autograd.grad((pooled * weights).sum(), images)[0] for pooled in (found, expected)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-15)
    with pytest.raises(RuntimeError, match="too small"):
        AveragePool2()(images[..., :1])
