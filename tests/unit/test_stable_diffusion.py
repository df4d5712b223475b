"""Stable Diffusion as a generator, against diffusers' own pipeline."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ims3_ray.config import FinetuneConfig, SamplingConfig
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.data.transforms import scaled, to_pil, to_signed, to_uint8
from ims3_ray.diffusion.samplers.base import Sampler, sample
from ims3_ray.engine.weights import Weights
from ims3_ray.errors import UserError
from ims3_ray.models.autoencoder import autoencoder_path, decoding_flops, empty_autoencoder, encoding_flops
from ims3_ray.models.generator import generator_files, generator_path, open_generator
from ims3_ray.models.generators.base import Generator
from ims3_ray.models.text import TextEncoder
from ims3_ray.stages.candidates import sampling_flops
from ims3_ray.training.finetuning import Finetuner, choose_trained
from tests.pipelines import write_pipeline

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES, PROMPTS, NEGATIVE = ("n01440764", "cat"), ("tench, Tinca tinca", "a small cat"), "cartoon"
LONG = "a fish that is long and thin and has scales of many colours, and a tail that is as wide as its body is high"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


def told(folder: Path) -> Generator:
    return open_generator(generator_path(str(folder))).told(NAMES, PROMPTS, NEGATIVE)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_samples_are_those_of_diffusers_image_to_image_pipeline(tmp_path: Path, prediction: str):
    folder = write_pipeline(tmp_path, prediction=prediction)
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    prototypes = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected = pipeline(
        prompt=[PROMPTS[1]] * 3, negative_prompt=[NEGATIVE] * 3, image=prototypes, strength=0.7, num_inference_steps=10,
        guidance_scale=8.0, generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)], output_type="latent",
    ).images  # fmt: skip
    generator = told(folder)
    network = generator.load()
    for count in (1, 3):  # one condition for all samples, or one for each
        words = None if count == 1 else [PROMPTS[1]] * 3
        found = sample(
            generator.predictor(network, 1, count, 8.0, words=words), generator.latent,
            [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)], generator.schedule, 10,
            around=prototypes, strength=0.7,
        )  # fmt: skip
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("steps", "strength"), [(50, 0.7), (10, 0.75), (4, 1.0), (20, 0.33)])
def test_sampling_from_prototypes_begins_where_diffusers_begins(folder: Path, steps: int, strength: float):
    pipeline = StableDiffusionImg2ImgPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    schedule = told(folder).schedule
    for name, scheduler in (("pndm", pipeline.scheduler), ("ddim", DDIMScheduler.from_config(pipeline.scheduler.config))):
        pipeline.scheduler = scheduler
        scheduler.set_timesteps(steps)
        timesteps, _ = pipeline.get_timesteps(steps, strength, "cpu")
        first = Sampler.registry[name].first_of(steps, strength)
        assert schedule.respaced(steps)[first] == timesteps[0], name


def test_a_sample_does_not_depend_on_its_batch(folder: Path):
    generator = told(folder)
    network = generator.load()

    def drawn(seeds: list[int], words: list[str]) -> torch.Tensor:
        predict = generator.predictor(network, 0, len(seeds), 4.0, words=words)
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample(predict, generator.latent, rngs, generator.schedule, 4, sampler="pndm")

    together = drawn([1, 2, 3], ["one fish", "two fish", "red fish"])
    torch.testing.assert_close(together[1:2], drawn([2], ["two fish"]), rtol=1e-5, atol=1e-5)
    assert (together[1:2] - drawn([2], ["one fish"])).abs().max() > 1e-3, "the words change the sample"


def test_long_texts_are_read_in_pieces(folder: Path):
    encoder = TextEncoder(folder)
    assert len(encoder.tokenizer(LONG).input_ids) > 77
    tokens = encoder.tokens(LONG)
    assert tokens.shape == (2, 77)
    begin, pad = encoder.tokenizer.bos_token_id, encoder.tokenizer.pad_token_id
    assert tokens[0, 0] == begin
    assert begin not in tokens[1]
    assert tokens[1, -1] == pad
    embedded = encoder(LONG)
    assert embedded.shape == (1, 154, 16)
    torch.testing.assert_close(embedded[:, 77:], encoder.model(tokens[1:])[0])
    generator = told(folder)
    condition = generator.condition(0, LONG)
    assert generator.null_beside(condition).shape == condition.shape
    torch.testing.assert_close(generator.null_beside(condition)[:, :77], generator.null, rtol=1e-5, atol=1e-5)
    wordy = open_generator(generator_path(str(folder))).told(NAMES, PROMPTS, LONG)
    assert wordy.condition(0).shape == wordy.null.shape == wordy.null_beside(wordy.condition(0)).shape == (1, 154, 16)
    predict = wordy.predictor(wordy.load(), 0, 1, 3.0)
    assert sample(predict, wordy.latent, [torch.Generator().manual_seed(0)], wordy.schedule, 2).shape == (1, 4, 8, 8)
    assert wordy.trained_condition(0, LONG).shape == wordy.trained_null.shape == (1, 77, 16)


def test_a_short_prompt_is_padded_as_by_the_pipeline(folder: Path):
    encoder = TextEncoder(folder)
    theirs = encoder.tokenizer("a cat", padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(encoder.tokens("a cat"), theirs)


@pytest.mark.parametrize("file", ["unet/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
                                  "scheduler/scheduler_config.json"])  # fmt: skip
def test_the_digest_covers_every_part(folder: Path, tmp_path: Path, file: str):
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = Weights.of(generator_path, str(copy), generator_files)
    assert before.digest == Weights.of(generator_path, str(folder), generator_files).digest
    other = write_pipeline(tmp_path / "other", prediction="v_prediction", seed=1)
    content = (other / file).read_bytes()
    (copy / file).write_bytes(content if content != (copy / file).read_bytes() else content.replace(b"}", b" }", 1))
    with pytest.raises(UserError, match="are not the same on every node"):
        before.path()


def test_operations_are_counted_on_the_architecture_alone(folder: Path):
    generator = told(folder)
    network, condition = generator.load(), generator.condition(0)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        network(torch.zeros(1, 4, 8, 8), torch.tensor([3]), condition)
    assert generator.forward_flops() == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("part", "settings", "message"),
    [
        ("unet", {"addition_embed_type": "text_time"}, "use Stable Diffusion 1 or 2"),
        ("unet", {"in_channels": 9}, "inpainting"),
        ("scheduler", {"beta_schedule": "squaredcos_cap_v2"}, "noise schedule 'squaredcos_cap_v2'"),
        ("scheduler", {"prediction_type": "sample"}, "predicts 'sample'"),
    ],
)
def test_pipelines_of_other_kinds_are_refused(
    folder: Path, tmp_path: Path, part: str, settings: dict[str, object], message: str
):
    copy = shutil.copytree(folder, tmp_path / "copy")
    file = copy / part / ("config.json" if part == "unet" else "scheduler_config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(UserError, match=message):
        open_generator(generator_path(str(copy)))


def test_a_pipeline_with_a_part_missing_is_refused_with_its_name(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="unet' holds no weights"):
        open_generator(generator_path(str(copy))).check()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "has no folder text_encoder"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "has no folder tokenizer"),
        (lambda folder: (folder / "text_encoder" / "model.safetensors").write_bytes(b"no tensors"), "does not load"),
        (lambda folder: leave_out(folder / "text_encoder" / "model.safetensors", "fc1.weight"), "has no fitting tensor '.*fc1"),
        (lambda folder: leave_out(folder / "unet" / "diffusion_pytorch_model.safetensors", "conv_in.bias"), "is missing"),
        (lambda folder: edit(folder / "unet" / "config.json", down_block_types=["Nonsense", "DownBlock2D"]), "cannot build"),
    ],
)  # fmt: skip
def test_damaged_parts_are_one_line(folder: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str):
    copy = shutil.copytree(folder, tmp_path / "copy")
    spoil(copy)
    with pytest.raises(UserError, match=message):
        open_generator(generator_path(str(copy))).check()


def leave_out(file: Path, name: str) -> None:
    """Write a weights file again without the first tensor whose name ends so."""
    tensors = load_file(file)
    tensors.pop(next(each for each in tensors if each.endswith(name)))
    save_file(tensors, file, metadata={"format": "pt"})


def edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def test_other_pipelines_are_named(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / "model_index.json", _class_name="StableDiffusionXLPipeline")
    with pytest.raises(UserError, match=r"Stable Diffusion 1 or 2 \(model_index\.json: StableDiffusionXLPipeline\)"):
        generator_path(str(copy))
    (copy / "model_index.json").write_text("[1]")
    with pytest.raises(UserError, match="must hold a JSON object"):
        generator_path(str(copy))


def test_the_package_that_reads_words_is_named_where_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install 'ims3-ray\[text\]'"):
        told(folder).check()


def test_a_scale_of_the_autoencoder_that_is_not_the_usual_one_is_in_its_keys(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert empty_autoencoder(autoencoder_path(str(copy))).version == {}
    edit(copy / "vae" / "config.json", scaling_factor=0.5)
    assert empty_autoencoder(autoencoder_path(str(copy))).version == {"scale": 0.5}


def test_a_hub_id_is_fetched_by_the_patterns_of_its_family(folder: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def fetched(reference: str, patterns: list[str], what: str) -> Path:
        asked.append(patterns)
        return folder

    monkeypatch.setattr("ims3_ray.models.generator.fetch", fetched)
    assert generator_path("org/name") == folder / "model_index.json"
    assert asked[0] == ["model_index.json", "generator.safetensors"]
    assert "vae/config.json" in asked[1]
    assert "transformer/*" not in asked[1]


def test_a_generator_of_labels_takes_no_words():
    with pytest.raises(UserError, match="is told labels, not words"):
        open_generator(generator_path("embedded:fashion-mnist-dit-coarse")).told(NAMES, PROMPTS, "")


def test_scaling_is_that_of_pillow():
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 48, 48), dtype=np.uint8))
    smooth = torch.nn.functional.avg_pool2d(pixels.float(), 3, 1, 1).round().to(torch.uint8)
    theirs = np.asarray(to_pil(smooth).resize((21, 21), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    ours = to_uint8(scaled(to_signed(smooth)[None], 21))[0].numpy()
    assert np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1


def test_the_operations_of_d4m_with_stable_diffusion_are_known_without_weights(tmp_path: Path):
    """The shapes of Stable Diffusion 1.5; the folder holds no weights."""
    parts = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "unet/config.json": {"sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 768},
        "text_encoder/config.json": {"max_position_embeddings": 77},
        "scheduler/scheduler_config.json": {
            "_class_name": "PNDMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
            "steps_offset": 1, "set_alpha_to_one": False,
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL", "in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 2,
            "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512,
        },
    }  # fmt: skip
    for name, content in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(content))
    generator = open_generator(generator_path(str(tmp_path)))
    assert generator.latent == (4, 64, 64)
    assert generator.forward_flops() == pytest.approx(0.8e12, rel=0.02)
    arm = yaml.safe_load((CONFIGS / "methods" / "d4m.yaml").read_text())["arms"]["d4m"]
    sampling = SamplingConfig.model_validate(arm["overrides"]["sampling"])
    assert sampling_flops(generator, sampling) == pytest.approx(36 * 2 * generator.forward_flops(), rel=1e-6)
    vae = empty_autoencoder(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    assert decoding_flops(vae, 64) == pytest.approx(2.5e12, rel=0.05)
    assert encoding_flops(vae, 512) == pytest.approx(1.1e12, rel=0.05)


@pytest.mark.parametrize("parameters", ["lora", "all"])
def test_a_merged_adapter_computes_the_fine_tuned_function(folder: Path, parameters: str):
    generator = told(folder)
    inputs = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 400])
    condition = torch.cat([generator.condition(0), generator.condition(1)])
    network = generator.load()
    with torch.no_grad():
        before = network(*inputs, condition)
    config = FinetuneConfig(parameters=parameters, rank=2)
    names = choose_trained(generator, network, config)
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    assert list(trained) == names
    assert parameters == "all" or all(name.rpartition(".")[2] in ("lora_up", "lora_down") for name in names)
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs, condition), before, rtol=1e-6, atol=1e-6)
        for number, value in enumerate(trained.values()):
            value += 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(number))
        tuned = network(*inputs, condition)
        assert (tuned - before).abs().max() > 1e-3
        plain = generator.load()
        generator.merge(plain, {name: value.detach().clone() for name, value in trained.items()})
        torch.testing.assert_close(plain(*inputs, condition), tuned, rtol=1e-4, atol=1e-4)


def test_lora_starts_with_the_same_values_in_every_process(folder: Path):
    one, other = ({name: value for name, value in network.named_parameters() if "lora" in name} for network in (
        _with_lora(folder), _with_lora(folder)
    ))  # fmt: skip
    assert one.keys() == other.keys() != set()
    assert all(torch.equal(one[name], other[name]) for name in one)
    downs = [value for name, value in one.items() if name.endswith("down")]
    assert not torch.equal(downs[0], downs[1])


def _with_lora(folder: Path) -> torch.nn.Module:
    generator = told(folder)
    network = generator.load()
    choose_trained(generator, network, FinetuneConfig(parameters="lora", rank=4))
    return network


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fine_tuning_by_captions_lowers_their_loss(folder: Path, precision: str):
    generator = told(folder)
    pixels = {"mean": torch.randn(4, 1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
              "log_variance": torch.full((4, 1, 4, 8, 8), -20.0)}  # fmt: skip
    images = CleanImages(pixels, torch.tensor([0, 0, 1, 1]), False, ["one", "two", LONG, "four"])
    config = FinetuneConfig(
        steps=30, batch_size=4, lr=0.02, parameters="lora", words="captions", precision=precision,
        activation_checkpointing=precision == "fp32",
        objectives={"inversion_matching": {"weight": 0.0}, "diffusion": {"weight": 1.0}},
    )  # fmt: skip
    tuner = Finetuner(generator.load(), generator, config, "cpu")
    batch = tuner.draw(images, torch.arange(4), torch.Generator().manual_seed(2))
    kept = batch.dropped_B.ne(generator.null).flatten(1).any(dim=1)
    expected = torch.cat([generator.trained_condition(0, text) for text in ("one", "two", LONG, "four")])
    assert batch.y_B.shape == (4, 77, 16), "long captions are cut"
    torch.testing.assert_close(batch.y_B, expected)
    torch.testing.assert_close(batch.dropped_B[kept], expected[kept])
    losses = [tuner.step(batch)["loss"] for _ in range(30)]
    assert losses[-1] < 0.98 * losses[0]
