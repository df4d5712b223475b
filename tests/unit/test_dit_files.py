"""Weights in the formats that people have: read, written, and refused where they would run foreign code."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import signal
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ims3_ray import RunConfig, UserError
from ims3_ray.commands.convert import ConvertConfig, convert
from ims3_ray.config import merge
from ims3_ray.data.classes import imagenet_wnids
from ims3_ray.engine.weights import Weights
from ims3_ray.models.difffit import add_difffit
from ims3_ray.models.dit import PUBLISHED, DiT, DiTConfig
from ims3_ray.models.dit_files import open_dit, with_classes, write_dit
from ims3_ray.models.generator import generator_files, generator_path, load_generator, open_generator
from ims3_ray.models.generators.dit import DiTGenerator
from ims3_ray.plan import make_plan
from ims3_ray.stages.generate import Generate
from tests.conftest import CLASSES, adapter_of, tiny_values
from tests.imagenet import as_on_the_hub

CONFIG = DiTConfig(
    input_size=8, in_channels=4, patch_size=2, hidden_size=64, depth=2, num_heads=1, num_classes=5, learn_sigma=True
)
INPUT = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.tensor([0, 5]))


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def release_state(model: DiT) -> dict[str, torch.Tensor]:
    return {**model.state_dict(), "pos_embed": model.get_buffer("pos_embed")}


def assert_same(loaded: DiT, model: DiT) -> None:
    assert loaded.config == model.config
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize("wrap", ["plain", "model", "ema", "distributed"])
def test_the_releases_state_dict_is_read_plain_or_wrapped(model: DiT, tmp_path: Path, wrap: str):
    state, file = release_state(model), tmp_path / "dit.pt"
    noise = {name: torch.zeros_like(value) for name, value in state.items()}
    settings = argparse.Namespace(model="DiT-XL/2", epochs=8)
    contents: dict[str, Any] = {
        "plain": state,
        "model": {"model": state, "opt": {"state": {}}, "args": settings},
        "ema": {"model": noise, "ema": state, "args": settings},
        "distributed": {"model": {f"module.{name}": value for name, value in state.items()}},
    }
    torch.save(contents[wrap], file)
    assert_same(load_generator(file), model)


def test_a_file_from_before_the_zip_format_is_read(model: DiT, tmp_path: Path):
    torch.save(release_state(model), tmp_path / "dit.pt", _use_new_zipfile_serialization=False)
    assert_same(load_generator(tmp_path / "dit.pt"), model)


def test_bare_safetensors_with_the_releases_names_are_read(model: DiT, tmp_path: Path):
    save_file(release_state(model), tmp_path / "dit.safetensors")
    assert_same(load_generator(tmp_path / "dit.safetensors"), model)


@pytest.mark.parametrize("safe", [True, False])
def test_a_pipeline_of_diffusers_is_read(model: DiT, tmp_path: Path, safe: bool):
    from diffusers import DiTTransformer2DModel

    write_dit(model, tuple("abcde"), tmp_path / "ours")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "ours" / "transformer").eval()
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # as the DiT release spaces its frequencies; see test_dit.py
    with torch.no_grad():
        torch.testing.assert_close(theirs(INPUT[0], INPUT[1], INPUT[2]).sample, model(*INPUT), rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs" / "transformer", safe_serialization=safe)
    path = generator_path(str(tmp_path / "theirs"))
    assert path.suffix == (".safetensors" if safe else ".bin")
    assert_same(load_generator(path), model)


def test_what_describes_a_pipeline_belongs_to_its_weights(model: DiT, tmp_path: Path):
    write_dit(model, tuple("abcde"), tmp_path / "pipeline")
    path = generator_path(str(tmp_path / "pipeline"))
    parts = {file.relative_to(tmp_path / "pipeline").as_posix() for file in open_generator(path).parts}
    assert {"transformer/config.json", "model_index.json"} <= parts
    broken = path.with_name("config.json")
    plain = json.loads(broken.read_text())
    broken.write_text(json.dumps({key: value for key, value in plain.items() if key != "num_embeds_ada_norm"}))
    with pytest.raises(UserError, match=r"a description that cannot be used \(KeyError: 'num_embeds_ada_norm'\)"):
        open_generator(path)


def test_a_pipeline_as_the_hub_has_it_is_read(tmp_path: Path):
    torch.manual_seed(0)
    model = DiT(CONFIG.model_copy(update={"num_classes": 1000}))
    write_dit(model, (), tmp_path / "dit")
    as_on_the_hub(tmp_path / "dit")
    path = generator_path(str(tmp_path / "dit"))
    assert_same(load_generator(path), model)
    assert open_dit(path).classes == imagenet_wnids()  # not the English names that it gives them


def test_a_thousand_other_classes_keep_their_names(tmp_path: Path):
    names = tuple(f"shop article {label}" for label in range(1000))
    write_dit(DiT(CONFIG.model_copy(update={"num_classes": 1000})), names, tmp_path / "dit")
    assert open_dit(generator_path(str(tmp_path / "dit"))).classes == names


def test_some_other_transformer_is_refused(model: DiT, tmp_path: Path):
    write_dit(model, (), tmp_path / "dit")
    config = tmp_path / "dit" / "transformer" / "config.json"
    other = {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"}
    config.write_text(json.dumps({**json.loads(config.read_text()), **other}))
    with pytest.raises(UserError, match=r"a folder without generator\.safetensors, a diffusers DiT"):
        generator_path(str(tmp_path / "dit"))


@pytest.mark.parametrize("name", ["dit.safetensors", "dit.pt", "pipeline"])
def test_what_is_written_is_read_again(model: DiT, tmp_path: Path, name: str):
    write_dit(model, tuple("abcde"), tmp_path / name)
    path = generator_path(str(tmp_path / name))
    assert_same(load_generator(path), model)
    assert open_dit(path).classes == (() if name == "dit.pt" else tuple("abcde"))
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_generator_of_a_thousand_classes_knows_them_by_wnid(tmp_path: Path):
    """The labels that the ImageWoof and ImageNette tables of the field give, and the ends of the list."""
    wide = CONFIG.model_copy(update={"num_classes": 1000})
    write_dit(DiT(wide), (), tmp_path / "dit.pt")
    labels = {
        "n02096294": 193, "n02093754": 182, "n02111889": 258, "n02088364": 162, "n02086240": 155, "n02089973": 167,
        "n02087394": 159, "n02115641": 273, "n02099601": 207, "n02105641": 229, "n01440764": 0, "n02102040": 217,
        "n03888257": 701, "n15075141": 999,
    }  # fmt: skip
    assert open_generator(tmp_path / "dit.pt").labels(list(labels)) == list(labels.values())
    assert list(imagenet_wnids()) == sorted(imagenet_wnids())
    with pytest.raises(UserError, match="knows no class 'n02096295'; nearest: n02096294"):
        open_generator(tmp_path / "dit.pt").labels(["n02096295"])


def test_a_generator_that_does_not_name_its_classes_is_refused(model: DiT, tmp_path: Path):
    write_dit(model, (), tmp_path / "dit.pt")
    with pytest.raises(UserError, match=r"does not name its classes; convert it with ims3 convert"):
        open_generator(tmp_path / "dit.pt").labels(["a"])


@pytest.mark.parametrize("size", list(PUBLISHED))
@pytest.mark.parametrize(("patch", "latent"), [(2, 32), (8, 64)])
def test_the_published_shapes_are_read_off_their_tensors(tmp_path: Path, size: str, patch: int, latent: int):
    config = PUBLISHED[size].model_copy(update={"patch_size": patch, "input_size": latent})
    with torch.device("meta"):
        model = DiT(config)
    torch.save(release_state(model), tmp_path / "dit.pt")  # without data: XL alone would be 2.7 GB
    assert open_dit(tmp_path / "dit.pt").config == config


@pytest.mark.parametrize(("size", "trained"), [("S", 483_104), ("B", 966_176), ("L", 1_484_832), ("XL", 1_739_552)])
def test_difffit_trains_the_published_number_of_parameters(size: str, trained: int):
    with torch.device("meta"):
        model = DiT(PUBLISHED[size])
    names = set(add_difffit(model, scaled_blocks=14))
    assert sum(p.numel() for name, p in model.named_parameters() if name in names) == trained
    if size == "XL":  # DiT counts its fixed position table as a parameter
        assert sum(p.numel() for p in model.parameters()) + model.get_buffer("pos_embed").numel() == 675_226_400


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["zip", "pickle"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "dit.pt"
    if how == "zip":
        torch.save({"model": {}, "args": Trap()}, file)
    else:
        file.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"foreign objects are not unpickled|not a readable PyTorch file"):
        load_generator(file)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"steps": 3}, "hold no state dict"),
        ({"weight": torch.zeros(2)}, "are no DiT's"),
        ([torch.zeros(2)], "hold no state dict"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: Any, says: str):
    torch.save(content, tmp_path / "dit.pt")
    with pytest.raises(UserError, match=says) as raised:
        load_generator(tmp_path / "dit.pt")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [0, 10, 5000])
def test_a_cut_off_file_is_refused(model: DiT, tmp_path: Path, cut: int):
    torch.save(release_state(model), tmp_path / "dit.pt")
    (tmp_path / "dit.pt").write_bytes((tmp_path / "dit.pt").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"not a readable PyTorch file|not unpickled") as raised:
        load_generator(tmp_path / "dit.pt")
    assert "\n" not in str(raised.value)


def test_a_tensor_that_does_not_fit_is_named(model: DiT, tmp_path: Path):
    write_dit(model, (), tmp_path / "pipeline")
    config = tmp_path / "pipeline" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 3}))
    with pytest.raises(UserError, match=r"'blocks\.2\.attn\.qkv\.weight' is missing"):
        load_generator(generator_path(str(tmp_path / "pipeline")))


def test_a_folder_without_a_pipeline_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"a folder without generator\.safetensors, a diffusers DiT"):
        generator_path(str(tmp_path))


def test_a_run_takes_a_pipeline_of_diffusers_by_its_folder(tiny_world: Path, tmp_path: Path):
    write_dit(load_generator(tiny_world / "dit.safetensors"), CLASSES, tmp_path / "pipeline")
    values = tiny_values(tiny_world, tmp_path / "runs", generator=str(tmp_path / "pipeline"))
    plan = make_plan(RunConfig.model_validate(values))
    (labels,) = {stage.labels for stage in plan.stages if isinstance(stage, Generate)}
    assert labels == tuple(CLASSES.index(name) for name in plan.classes.names)


def test_a_generator_of_latents_is_refused_in_one_line(tiny_world: Path, model: DiT, tmp_path: Path):
    write_dit(model, tuple("abcde"), tmp_path / "dit.safetensors")
    values = tiny_values(tiny_world, tmp_path / "runs", generator=str(tmp_path / "dit.safetensors"))
    with pytest.raises(UserError, match="4-channel latents; name their autoencoder"):
        make_plan(RunConfig.model_validate(values))


def test_a_table_of_labels_without_a_row_for_no_class_is_read_right(tmp_path: Path):
    """A DiT that was trained without label dropout has one row per class. The class names tell it from one with a row more."""
    shape = DiTConfig(
        input_size=8, in_channels=1, patch_size=4, hidden_size=64, depth=1, num_heads=1, num_classes=3, null_row=False
    )
    model = DiT(shape)
    path = tmp_path / "release.pt"
    torch.save({**model.state_dict(), "pos_embed": model.get_buffer("pos_embed")}, path)
    assumed = open_dit(path)
    assert (assumed.config.num_classes, assumed.config.null_row) == (2, True)
    named = with_classes(assumed, ("a", "b", "c"))
    assert named.config == shape
    assert with_classes(assumed, ("a", "b")).config.null_row
    with pytest.raises(UserError, match=r"4 class names for a generator of 2 classes; its table of labels has 3 rows"):
        with_classes(assumed, ("a", "b", "c", "d"))

    write_dit(model, ("a", "b", "c"), tmp_path / "own.safetensors")
    again = DiTGenerator.open(tmp_path / "own.safetensors")
    assert (again.config, again.knows_null) == (shape, False)
    z, t, y = torch.randn(3, 1, 8, 8), torch.tensor([5]), torch.tensor([0, 1, 2])
    torch.testing.assert_close(again.load()(z, t.expand(3), y), model.eval()(z, t.expand(3), y))

    write_dit(model, ("a", "b", "c"), tmp_path / "pipeline")
    assert open_dit(tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").config == shape


def test_a_generator_without_a_null_label_is_not_guided(tiny_world: Path, tmp_path: Path):
    shape = open_dit(tiny_world / "dit.safetensors").config.model_copy(update={"null_row": False})
    path = tmp_path / "dit.safetensors"
    write_dit(DiT(shape), CLASSES, path)
    values = tiny_values(tiny_world, tmp_path, generator=str(path))
    with pytest.raises(UserError, match=r"cannot be guided; set sampling\.cfg_scale=1 finetune\.label_dropout=0"):
        make_plan(RunConfig.model_validate(values))
    plain = {"sampling": {"cfg_scale": 1}, "finetune": {"label_dropout": 0}}
    assert make_plan(RunConfig.model_validate(merge(values, plain))).stages


def test_a_file_of_tensors_alone_is_not_written_of_a_network_that_would_be_read_as_another(tmp_path: Path):
    """Two heads would be read of a width of 128."""
    model = DiT(CONFIG.model_copy(update={"hidden_size": 128, "num_heads": 4}))
    with pytest.raises(UserError, match=r"could not say that this DiT of width 128 and depth 2 has 4 heads, since a \.pt file"):
        write_dit(model, (), tmp_path / "dit.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["dit.safetensors", "dit.pt", "pipeline"])
def test_nothing_is_left_of_weights_that_cannot_be_written(model: DiT, tmp_path: Path, name: str):
    """The limit on the size of a file stands for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        for _ in range(2):
            with pytest.raises(UserError, match=f"{name}' cannot be written: .*File too large"):
                write_dit(model, (), tmp_path / name)
            assert not list(tmp_path.iterdir())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_names_of_classes_are_read_in_composed_form(model: DiT, tmp_path: Path):
    names = tuple(unicodedata.normalize("NFD", name) for name in ("café", "thé", "c", "d", "e"))
    write_dit(model, names, tmp_path / "dit.safetensors")
    assert open_generator(tmp_path / "dit.safetensors").labels(["thé"]) == [1]
    assert with_classes(open_dit(tmp_path / "dit.safetensors"), names).classes[0] == "café"


def test_two_classes_of_one_name_are_told_apart_by_nobody(model: DiT, tmp_path: Path):
    write_dit(model, tuple("abacd"), tmp_path / "dit.safetensors")
    generator = open_generator(tmp_path / "dit.safetensors")
    assert generator.labels(["b", "d"]) == [1, 4]
    with pytest.raises(UserError, match="has two classes called 'a'; ims3 convert classes=FILE renames them"):
        generator.labels(["a"])
    with pytest.raises(UserError, match="two classes are called 'c' in the list of class names"):
        with_classes(open_dit(tmp_path / "dit.safetensors"), tuple("abccd"))


def test_an_adapter_of_a_pipeline_is_merged_into_it(model: DiT, tmp_path: Path):
    """The adapter names its generator by a hash of all files of the pipeline."""
    write_dit(model, tuple("abcde"), tmp_path / "pipeline")
    pipeline, tuned = str(tmp_path / "pipeline"), load_generator(generator_path(str(tmp_path / "pipeline")))
    add_difffit(tuned, scaled_blocks=2)
    digest = Weights.of(generator_path, pipeline, generator_files).digest
    for name, of in (("mine", digest), ("other", "0" * 64)):
        about = {"adapter": json.dumps({"config": {}, "generator": of})}
        save_file(adapter_of(tuned), tmp_path / f"{name}.safetensors", about)
    out = tmp_path / "out.safetensors"
    convert(ConvertConfig(generator=pipeline, adapter=str(tmp_path / "mine.safetensors"), out=str(out)))
    assert open_dit(out).classes == tuple("abcde")
    with pytest.raises(UserError, match="was trained from other weights"):
        convert(ConvertConfig(generator=pipeline, adapter=str(tmp_path / "other.safetensors"), out=str(tmp_path / "no")))
