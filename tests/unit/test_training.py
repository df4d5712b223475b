"""The loops of the ground floor: how a learning rate moves, and a generator in training, without Ray."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs
from safetensors.torch import load
from torch import nn
from torch.nn.functional import interpolate

from ims3_ray.cluster import speed
from ims3_ray.config import EncoderTraining, GeneratorTraining, PretrainConfig, SamplingConfig
from ims3_ray.config.loading import load_config
from ims3_ray.data.clean_images import CleanImages
from ims3_ray.data.transforms import to_signed
from ims3_ray.engine.train import CHECKPOINTS, forget_broken_record
from ims3_ray.errors import UserError
from ims3_ray.models.encoder import encoder_config, known_classes
from ims3_ray.objectives.diffusion import diffusion_loss
from ims3_ray.seeds import seed_for
from ims3_ray.training.encoder import EncoderTrainer
from ims3_ray.training.epochs import EpochTrainer
from ims3_ray.training.generator import PREVIEW_IMAGES, GeneratorTrainer, in_bf16
from ims3_ray.training.pace import ByClock, BySteps


def test_by_steps_the_rate_rises_stays_and_falls():
    pace = BySteps(10, warmup=0.4, cooldown=0.2)
    assert [pace.factor(step) for step in range(11)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.5, None]
    assert [BySteps(3, warmup=0.05, cooldown=0.0).factor(step) for step in range(4)] == [1, 1, 1, None]


def test_by_the_clock_it_falls_over_the_last_part_of_the_time_and_then_the_training_ends():
    now = itertools.chain([100.0, 101.0, 104.0, 106.0, 108.0, 109.0, 110.0])
    pace = ByClock(10.0, warmup=0.2, cooldown=0.4, clock=lambda: next(now))
    # It begins at step 7: the steps of an earlier training do not count as warm-up.
    assert [pace.factor(step) for step in range(7, 14)] == pytest.approx([0, 0.5, 1, 1, 0.5, 0.25, None])


def test_by_the_clock_an_interrupted_training_has_the_rest_of_its_time():
    now = itertools.chain([50.0, 51.0, 52.0, 54.0])
    pace = ByClock(10.0, warmup=0.5, cooldown=0.2, spent=6.0, clock=lambda: next(now))
    assert [pace.factor(step) for step in range(30, 34)] == pytest.approx([1, 1, 1, None])


def test_the_clock_is_read_ever_more_seldom_and_the_time_between_is_reckoned():
    reads: list[float] = []

    def clock() -> float:
        reads.append(float(step))
        return float(step)

    pace = ByClock(300.0, warmup=0.1, cooldown=0.1, clock=clock)
    found = []
    for step in range(400):
        found.append(pace.factor(step))
    assert found.index(None) == 300
    assert len(reads) < 80
    assert found[:300] == pytest.approx([min(1.0, step / 30, (300 - step) / 30) for step in range(300)])


def images() -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(24) % 2
    pixels = torch.zeros(24, 1, 8, 8, dtype=torch.uint8)
    pixels[labels == 1, :, :4] = 255
    return pixels, labels


def trainer(**settings: Any) -> GeneratorTrainer:
    values = {"patch_size": 4, "hidden_size": 32, "depth": 1, "num_heads": 2, "batch_size": 8, "precision": "fp32", **settings}
    return GeneratorTrainer(GeneratorTraining.model_validate(values), CleanImages.of_pixels(*images()), 2, seed=0)


def test_min_snr_weighting_trains_and_gives_other_losses():
    plain, weighted = trainer(), trainer(min_snr=5)
    run(plain, 4), run(weighted, 4)
    assert all(low <= high for low, high in zip(weighted.losses, plain.losses, strict=True)), "equal where the noise is strong"
    assert weighted.losses != plain.losses
    assert weighted.losses[0] > 0


def run(trainer: GeneratorTrainer, steps: int) -> list[float]:
    list(trainer.run(BySteps(steps, 0.1, 0.1)))
    return trainer.losses


def test_a_generator_learns_and_its_file_holds_the_average():
    learner = trainer(lr=3e-3)
    losses = run(learner, 80)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    state = load(learner.weights(["a", "b"]))
    for name, average in learner.ema.average.items():
        torch.testing.assert_close(state[name].float(), average, rtol=1e-3, atol=1e-4)
    assert any((state[name].float() - value).abs().max() > 1e-4 for name, value in learner.model.state_dict().items())


def test_the_first_loss_is_that_of_a_model_that_predicts_no_noise():
    learner = trainer(label_dropout=0.0)
    rng = torch.Generator().manual_seed(seed_for(learner.seed, "generator", 0, 0))
    noise = torch.randn(8, 1, 8, 8, generator=rng)
    assert run(learner, 1)[0] == pytest.approx(diffusion_loss(torch.zeros_like(noise), noise).item(), rel=1e-5)


def test_stopped_and_restored_it_computes_the_same():
    expected, first, second = run(trainer(flip=True), 6), trainer(flip=True), trainer(flip=True)
    next(itertools.islice(first.run(BySteps(6, 0.1, 0.1)), 2, None))
    assert first.steps == 3
    second.restore(first.state())
    assert run(second, 6) == pytest.approx(expected, rel=1e-6)


def test_from_weights_alone_it_goes_on_with_the_steps_and_the_order_of_images_that_are_due():
    first, second, other = trainer(lr=3e-3), trainer(lr=3e-3), trainer(lr=3e-3)
    run(first, 60)
    second.start_from({name: value.half().float() for name, value in first.ema.average.items()}, first.steps)
    run(second, 70)
    assert (second.steps, len(second.losses)) == (70, 10)
    assert sum(second.losses) < 0.8 * sum(run(other, 10)), "what was learnt is kept"
    with pytest.raises(UserError, match="another shape"):
        trainer(hidden_size=16).start_from(dict(first.ema.average), 60)


def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_step():
    broken = trainer()
    with torch.no_grad():
        broken.model.final_layer.linear.bias.fill_(float("inf"))
    with pytest.raises(UserError, match=r"the loss of step 1 is not finite; lower generator.lr"):
        run(broken, 3)


def test_parts_of_two_workers_are_the_whole_batch():
    seen = [set(), set()]
    for rank in range(2):
        part = GeneratorTrainer(trainer().config, CleanImages.of_pixels(*images()), 2, 0, rank=rank, world=2)
        part._step = lambda index, lr, rank=rank, part=part: (  # type: ignore[method-assign, misc]
            seen[rank].update(index.tolist()), part._unread.append(torch.zeros(()))
        )  # fmt: skip
        list(part.run(BySteps(3, 0.1, 0.1)))
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(24))


class Sums(EpochTrainer[EncoderTraining]):
    """One linear layer, whose gradient is the mean of the inputs."""

    setting = "lr"

    @property
    def trained(self) -> nn.Module:
        return self.wrapped

    def loss(self, index: torch.Tensor) -> torch.Tensor:
        return self.wrapped(torch.tensor([[1.0], [10.0], [100.0]])[index]).mean()

    def weights(self) -> bytes:
        return b""


def test_workers_whose_parts_differ_in_size_weigh_all_images_of_a_batch_equally():
    """Three images for two workers: the mean of the workers' gradients is that of all images."""
    settings = EncoderTraining(batch_size=3, epochs=1)
    parts = [Sums(settings, nn.Linear(1, 1), torch.zeros(3), 0, "cpu", rank, 2, None) for rank in range(2)]
    for part in parts:
        list(part.epochs())
    assert [part.wrapped.weight.grad.item() for part in parts] != [37.0, 37.0]
    assert sum(part.wrapped.weight.grad.item() for part in parts) / 2 == pytest.approx(37.0)


@pytest.mark.parametrize(("flops_per_s", "side"), [(1e15, 2048), (1e12, 2048), (1e9, 256)])
def test_the_rate_of_matrix_products_is_measured_on_small_ones_where_large_ones_would_take_minutes(
    flops_per_s: float, side: int, monkeypatch: pytest.MonkeyPatch
):
    sides = []

    def seconds(device: object, dtype: object, size: int, repeats: int) -> float:
        sides.append(size)
        return 2 * size**3 * repeats / flops_per_s

    monkeypatch.setattr(speed, "_seconds", seconds)
    assert speed.matmul_rate.__wrapped__("cpu") == pytest.approx(flops_per_s)
    assert sides[-1] == side


def encoder_trainer(rank: int = 0, world: int = 1, epochs: int = 3) -> EncoderTrainer:
    config = EncoderTraining(model_args={"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}, epochs=epochs, batch_size=8)
    return EncoderTrainer(config, (*images(), ("a", "b")), seed=0, rank=rank, world=world)


def test_an_encoder_learns_and_goes_on_from_its_state_as_if_nothing_had_happened():
    whole = encoder_trainer()
    assert list(whole.epochs()) == [1, 2, 3]
    assert whole.steps == 3 * whole.steps_per_epoch == 9
    assert sum(whole.losses[-3:]) < sum(whole.losses[:3])
    first, second = encoder_trainer(), encoder_trainer()
    assert next(first.epochs()) == 1
    second.restore(first.state())
    assert list(second.epochs()) == [2, 3]
    assert second.losses == whole.losses
    for name, value in whole.encoder.state_dict().items():
        assert torch.equal(second.encoder.state_dict()[name], value), name


def test_an_encoders_file_names_its_classes_and_normalises_by_its_images(tmp_path: Path):
    trainer = encoder_trainer(epochs=1)
    list(trainer.epochs())
    path = tmp_path / "phi.safetensors"
    path.write_bytes(trainer.weights())
    assert known_classes(path) == ("a", "b")
    pixels = 2 * (images()[0].double() / 255) - 1
    config = encoder_config(path)
    assert (config.mean, config.std) == pytest.approx((pixels.mean().item(), pixels.std(correction=0).item()), abs=1e-3)


def test_patches_are_as_small_as_64_of_them_allow_unless_their_size_is_given():
    sides = {size: GeneratorTraining().patch_side(size) for size in (8, 16, 28, 30, 32, 64, 96)}
    assert sides == {8: 2, 16: 2, 28: 4, 30: 5, 32: 4, 64: 8, 96: 12}
    assert GeneratorTraining(patch_size=2).patch_side(28) == 2


def test_a_preview_shows_samples_of_the_average_from_the_same_noise():
    learner = trainer(lr=3e-3)
    sampling = SamplingConfig(steps=3)
    before, again = learner.preview(sampling), learner.preview(sampling)
    assert before.shape == (2 * PREVIEW_IMAGES, 1, 8, 8)
    assert before.dtype == torch.uint8
    assert torch.equal(before, again)
    run(learner, 30)
    assert not torch.equal(learner.preview(sampling), before)


def test_bfloat16_is_used_where_it_is_not_imitated(monkeypatch: pytest.MonkeyPatch):
    cpu = torch.device("cpu")
    for able, half in (
        ({"avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        assert in_bf16(GeneratorTraining(), cpu) is half
        assert in_bf16(GeneratorTraining(precision="bf16"), cpu)
        assert not in_bf16(GeneratorTraining(precision="fp32"), cpu)


def test_steps_and_minutes_are_alternatives():
    assert GeneratorTraining().minutes == 30
    assert GeneratorTraining(steps=5).minutes is None
    assert load_config(PretrainConfig, None, ["generator.steps=5"]).generator.minutes is None
    assert load_config(PretrainConfig, None, ["generator.minutes=5"]).generator.steps is None
    with pytest.raises(UserError, match="set one of steps and minutes, and leave the other out"):
        load_config(PretrainConfig, None, ["generator.steps=5", "generator.minutes=5"])


@pytest.mark.parametrize(
    ("record", "kept"),
    [
        (json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_1"}]}), True),
        (json.dumps({"checkpoint_results": []}), True),
        (json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_2"}]}), False),
        ('{"checkpoint_results": [', False),
        ("[]", False),
    ],
)
def test_a_record_of_checkpoints_that_ray_train_cannot_use_is_deleted(record: str, kept: bool, tmp_path: Path):
    (tmp_path / "checkpoint_1").mkdir()
    file = tmp_path / CHECKPOINTS
    filesystem = fs.LocalFileSystem()
    forget_broken_record(filesystem, str(tmp_path))  # there is none
    file.write_text(record)
    forget_broken_record(filesystem, str(tmp_path))
    assert file.exists() == kept


def test_a_classifier_scales_images_to_the_size_that_it_was_trained_at():
    """A teacher that is given images of a protocol's size, of which it would recognise little."""
    trainer = encoder_trainer()
    side = trainer.pixels.shape[-1]
    encoder = trainer.encoder.eval()
    assert encoder.config.size == side
    small = to_signed(trainer.pixels[:4])
    large = interpolate(small, (3 * side, 3 * side), mode="bicubic", antialias=True)
    with torch.no_grad():
        wanted = encoder.logits(interpolate(large, (side, side), mode="bicubic", antialias=True))
        torch.testing.assert_close(encoder.logits(large), wanted)
