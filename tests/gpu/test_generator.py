"""DiT, sampling, the pool's worker and the autoencoder on a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ims3_ray.config import GeneratorTraining, SamplingConfig
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.diffusion.prediction import guided
from ims3_ray.diffusion.samplers.base import sample
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.engine.images import ImageStore, Produced
from ims3_ray.engine.worker import Derivation, UnitWorker, Work
from ims3_ray.io.artifacts import Artifact
from ims3_ray.io.storage import Storage
from ims3_ray.models.dit import DiT, DiTConfig
from ims3_ray.models.encoder import load_encoder
from ims3_ray.models.generator import load_generator
from ims3_ray.stages.adapters import Pretrained
from ims3_ray.stages.candidates import Candidates
from ims3_ray.stages.features import Features
from ims3_ray.training.generator import GeneratorTrainer
from ims3_ray.training.pace import BySteps
from tests.conftest import write_latent_world
from tests.gpu.conftest import distance

SAMPLERS = ["ddim", "ddpm", "dpm++2m"]
SHAPE = DiTConfig(
    input_size=16, in_channels=4, patch_size=2, hidden_size=128, depth=4, num_heads=4, num_classes=10, learn_sigma=True
)


@pytest.fixture(scope="module")
def model() -> DiT:
    torch.manual_seed(0)
    model = DiT(SHAPE).eval().requires_grad_(False)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.05)
    return model


def drawn(model: DiT, device: str, sampler: Any = "ddpm", dtype: torch.dtype = torch.float32, batch: int = 4) -> torch.Tensor:
    copy = DiT(SHAPE).eval().requires_grad_(False)
    copy.load_state_dict(model.state_dict())
    copy.to(device, dtype)
    label = torch.tensor([3], device=device)
    predict = guided(copy, label, SHAPE.null_label, 4.0, 3, variance=sampler == "ddpm")
    rngs = [torch.Generator().manual_seed(index) for index in range(batch)]
    return sample(predict, (4, 16, 16), rngs, NoiseSchedule(), 8, sampler=sampler, device=device)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_those_of_the_cpu(model: DiT, device: str, sampler: str):
    found = drawn(model, device, sampler)
    assert found.device.type == device
    assert distance(found, drawn(model, "cpu", sampler)) < 1e-4


def test_samples_in_bfloat16_are_near_those_in_float32(model: DiT, device: str):
    assert 0 < distance(drawn(model, device, dtype=torch.bfloat16), drawn(model, "cpu")) < 0.05


@pytest.mark.cuda_only
def test_compiled_blocks_compute_the_same(model: DiT, device: str):
    z, t, y = torch.randn(8, 4, 16, 16, device=device), torch.tensor([500], device=device), torch.tensor([3], device=device)
    plain = DiT(SHAPE).eval().requires_grad_(False)
    plain.load_state_dict(model.state_dict())
    plain.to(device)
    expected = plain(z, t, y)
    for block in plain.blocks:
        block.compile(dynamic=False)
    assert distance(plain(z, t, y), expected) < 1e-4


def candidates(world: Path, device: str, autoencoder: Path | None = None, **changes: Any) -> Candidates:
    sampling = SamplingConfig.model_validate({"steps": 4, "unit_size": 8, "clip": autoencoder is None, **changes})
    return Candidates(sampling, Pretrained.of_file(world / "dit.safetensors"), None, autoencoder, 0, device)


def test_a_unit_of_candidates_is_that_of_the_cpu_and_done_again_the_same_to_the_byte(tiny_world: Path, device: str):
    expected, produce = candidates(tiny_world, "cpu")("c0001-u00002"), candidates(tiny_world, device)
    found, again = produce("c0001-u00002"), produce("c0001-u00002")
    assert found.pixels.device.type == device
    assert (found.pixels.cpu().int() - expected.pixels.int()).abs().max() <= 1
    assert torch.equal(found.pixels, again.pixels)


def test_the_pools_worker_stores_and_notes_what_the_cpu_would(tiny_world: Path, tmp_path: Path, device: str):
    notes, features = [], []
    for place, own in (("cpu", "cpu"), ("gpu", device)):
        storage = Storage.at(str(tmp_path / place))
        images, embedded = Artifact(storage, "generate", "k"), Artifact(storage, "embed", "k")
        derived = Derivation(lambda on: Features(load_encoder(tiny_world / "phi.safetensors"), on), embedded)
        work = Work(lambda on: candidates(tiny_world, on), ImageStore(images, "png"), (derived,), images)
        worker = UnitWorker([work], 1, 2, lambda own=own: own)  # type: ignore[misc]
        row: Any = {"units": [json.dumps([(0, "c0002-u00000")])]}
        notes.append(json.loads(worker(row)["entries"][0])[0][2])
        assert json.loads(images.read("c0002-u00000.json")) == notes[-1]
        features.append(load(embedded.read("c0002-u00000.safetensors"))["features"])
    assert [note["images"] for note in notes] == [8, 8]
    assert ("NVIDIA" in notes[1]["hardware"]["device"]) == (device == "cuda")
    # A pixel may round to the next grey level, so features are near, not equal.
    assert (features[0] * features[1]).sum(dim=1).min() > 0.999


@pytest.fixture
def little_memory() -> Iterator[Any]:
    """A function that leaves this process so many bytes of the GPU's memory."""

    def leave(count: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(count / torch.cuda.get_device_properties(0).total_memory)

    yield leave
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.cuda_only
def test_where_memory_does_not_suffice_a_unit_is_made_in_halves(tiny_world: Path, little_memory: Any, device: str):
    size = 32768  # of such small images: so that activations are most of the memory
    produce = candidates(tiny_world, device, unit_size=size, steps=2)
    torch.cuda.reset_peak_memory_stats()
    expected = produce("c0000-u00000")
    assert expected.batch is None
    little_memory(0.7 * torch.cuda.max_memory_allocated())
    found = produce("c0000-u00000")
    assert found.batch is not None
    assert found.batch < size
    assert (found.pixels.int() - expected.pixels.int()).abs().max() <= 1


@pytest.mark.cuda_only
def test_where_memory_does_not_suffice_features_are_computed_in_parts(tiny_world: Path, little_memory: Any, device: str):
    size = 32768
    produced = Produced(torch.randint(256, (size, 1, 8, 8), dtype=torch.uint8, device=device), [""] * size)
    features = Features(load_encoder(tiny_world / "phi.safetensors"), device)
    features.batch = size
    torch.cuda.reset_peak_memory_stats()
    whole = load(features("c0000-u00000", produced).data)["features"]
    little_memory(0.7 * torch.cuda.max_memory_allocated())
    parts = load(features("c0000-u00000", produced).data)["features"]
    assert features.batch < size
    assert distance(parts, whole) < 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latents_are_encoded_and_decoded_as_on_the_cpu(tmp_path: Path, device: str, precision: str):
    pytest.importorskip("diffusers")
    from ims3_ray.models.autoencoder import autoencoder_path, load_autoencoder

    write_latent_world(tmp_path)
    vae = autoencoder_path(str(tmp_path / "vae"))
    found = candidates(tmp_path, device, vae, precision=precision)("c0001-u00000")
    expected = candidates(tmp_path, "cpu", vae)("c0001-u00000")
    most = 2 if precision == "fp32" else 40
    assert (found.pixels.cpu().int() - expected.pixels.int()).abs().max() <= most
    assert (found.pixels.cpu().int() - expected.pixels.int()).abs().float().mean() <= most / 4
    pixels = torch.rand(4, 1, 8, 8) * 2 - 1
    for there, here in zip(
        load_autoencoder(vae).to(device).moments(pixels.to(device)), load_autoencoder(vae).moments(pixels), strict=True
    ):
        assert distance(there, here) < 1e-4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_generator_in_training_learns_on_the_gpu(device: str, precision: str):
    pixels = torch.zeros(60, 1, 8, 8, dtype=torch.uint8)
    labels = torch.arange(60) % 3
    for label in range(3):
        pixels[labels == label, :, :, 3 * label : 3 * label + 2] = 255
    config = GeneratorTraining(
        patch_size=4, hidden_size=64, depth=2, num_heads=2, batch_size=30, lr=3e-3, flip=True, precision=precision,  # type: ignore[arg-type]
    )  # fmt: skip
    trainer = GeneratorTrainer(config, CleanImages.of_pixels(pixels, labels, config.flip), 3, 0, device)
    list(trainer.run(BySteps(120, 0.08, 0.33)))
    first, last = (sum(part) / 20 for part in (trainer.losses[:20], trainer.losses[-20:]))
    assert last < 0.6 * first
    assert next(trainer.model.parameters()).device.type == device
    state = load(trainer.weights(["a", "b", "c"]))
    assert all(value.dtype == torch.float16 and value.isfinite().all() for value in state.values())


def trainer_of(device: str, compiled: bool = False) -> GeneratorTrainer:
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 1, 8, 8), dtype=torch.uint8, generator=rng), torch.arange(20) % 2
    config = GeneratorTraining(
        patch_size=4, hidden_size=32, depth=1, num_heads=2, batch_size=8, precision="fp32", lr=3e-3, compile=compiled
    )
    return GeneratorTrainer(config, CleanImages.of_pixels(*images), 2, 0, device)


def goes_on_from_its_state(device: str, compiled: bool) -> None:
    whole, half, other = (trainer_of(device, compiled) for _ in range(3))
    list(whole.run(BySteps(12, 1, 1)))
    for step in half.run(BySteps(12, 1, 1)):
        if step == 6:
            break
    other.restore(half.state())
    list(other.run(BySteps(12, 1, 1)))
    assert other.losses == pytest.approx(whole.losses, rel=1e-4)


def test_a_training_goes_on_from_its_state(device: str):
    goes_on_from_its_state(device, compiled=False)


@pytest.mark.cuda_only
def test_a_step_that_is_a_cuda_graph_is_the_same_step(device: str):
    plain, captured = trainer_of(device), trainer_of(device, compiled=True)
    for trainer in (plain, captured):
        list(trainer.run(BySteps(12, 1, 1)))  # the learning rate is another one in each step
    assert captured.losses == pytest.approx(plain.losses, rel=1e-4)
    for name, parameter in captured.model.named_parameters():
        assert distance(parameter, dict(plain.model.named_parameters())[name]) < 1e-3
    goes_on_from_its_state(device, compiled=True)


def test_weights_that_a_gpu_has_held_load_on_the_cpu(tiny_world: Path, device: str):
    model = load_generator(tiny_world / "dit.safetensors").to(device)
    again = DiT(model.config)
    again.load_state_dict({name: value.cpu() for name, value in model.state_dict().items()})
    assert next(again.parameters()).device.type == "cpu"
