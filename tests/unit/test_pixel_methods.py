"""DM, IDC, SRe2L and RDED: single steps against computations by hand, and continuing from a saved state."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from ims3_ray import saving
from ims3_ray.data.decoding import Undecodable
from ims3_ray.diffusion.schedule import NoiseSchedule
from ims3_ray.errors import UserError
from ims3_ray.models.encoder import Encoder, EncoderConfig
from ims3_ray.models.students import STUDENTS, build_student
from ims3_ray.models.teacher import TeacherNetwork
from ims3_ray.seeds import generator_for, seed_for
from ims3_ray.synthesis.base import Costs, Given, Inputs, Piece, Synthesis
from ims3_ray.synthesis.cao2 import CaO2
from ims3_ray.synthesis.dm import DM
from ims3_ray.synthesis.idc import IDC, Matching, gradient_distance, gradients, momentum_steps
from ims3_ray.synthesis.pixels import FreshNetworks
from ims3_ray.synthesis.rded import RDED, crops_of, mosaics
from ims3_ray.synthesis.sre2l import BatchNormDistance, SRe2L, augmented

SIZE, CLASSES = 16, 3


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def real(position: int) -> Tensor:
    """Images of a class, which has a bright bar at its place."""
    pixels = torch.randint(60, (40, 1, SIZE, SIZE), generator=rng(position))
    pixels[:, :, :, 5 * position : 5 * position + 5] += 150
    return pixels.to(torch.uint8)


STATISTICS = (torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), 0.3))


class Files:
    """The originals: larger than the images of the set, and not square."""

    def count(self, position: int) -> int:
        return 40

    def image(self, position: int, index: int) -> Image.Image:
        if index == 7:
            raise Undecodable("broken")
        return Image.fromarray(real(position)[index, 0].numpy()).resize((3 * SIZE, 2 * SIZE))


@pytest.fixture(scope="module")
def teacher() -> TeacherNetwork:
    torch.manual_seed(0)
    shape = EncoderConfig(
        model="resnet18", model_args={"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}, channels=1, num_classes=5, mean=-0.4,
        std=0.6,
    )  # fmt: skip
    encoder = Encoder(shape)
    encoder.train()
    with torch.no_grad():
        for _ in range(20):  # gives the batch norms statistics of images
            encoder.logits(torch.cat([real(position) for position in range(CLASSES)]).float() / 127.5 - 1)
    return TeacherNetwork(encoder, [4, 0, 2])


def inputs_of(**more: Any) -> dict[str, Any]:
    return {
        "num_classes": CLASSES, "seed": 5, "device": "cpu", "size": SIZE, "channels": 1, "counts": (40,) * CLASSES,
        "real": real, "originals": Files(), "statistics": STATISTICS, **more,
    }  # fmt: skip


def part_of(method: Synthesis, part: list[tuple[int, int]], from_nothing: bool = False, **more: Any) -> Given:
    """The input of a part that starts from the first real images; preparations are made when they are asked for."""
    inputs = inputs_of(**more)
    made: dict[Piece, Mapping[str, Tensor]] = {}

    def prepared(piece: Piece) -> Mapping[str, Tensor]:
        assert piece in method.pieces(method.config, inputs["counts"])
        return made.setdefault(piece, method.prepare(piece, Inputs(**inputs)))

    start = torch.stack([real(position)[number] for position, number in part])
    return Given(
        pixels=start[:0] if from_nothing else start, classes=torch.tensor([position for position, _ in part]),
        indices=torch.tensor([number for _, number in part]), prepared=prepared, **inputs,
    )  # fmt: skip


def nothing(state: bytes, done: float = 0.0) -> None:
    return None


def of_class(position: int, k: int = 2) -> list[tuple[int, int]]:
    return [(position, number) for number in range(k)]


def assert_goes_on(method: Synthesis, given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """From every state that is saved on the way, the part is finished to the same bytes."""
    monkeypatch.setattr(saving, "SAVE_EVERY_S", 0.0)
    states: list[bytes] = []
    shares: list[float] = []

    def save(state: bytes, done: float = 0.0) -> None:
        states.append(state)
        shares.append(done)

    whole = method.make(given, None, save)["pixels"]
    assert len(states) >= 3
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert shares[-1] == 1
    for state in states[:-1]:
        assert torch.equal(method.make(given, state, nothing)["pixels"], whole)
    assert not torch.equal(whole, given.pixels)


# DM


def dm(**settings: Any) -> DM:
    return DM(DM.Config.model_validate({"steps": 2, "width": 4, "batch_size": 8, "lr": 30.0, "pad_to": None, **settings}))


def test_two_steps_of_dm_are_sgd_on_the_distance_of_mean_features():
    method, position = dm(dsa=()), 1
    given = part_of(method, of_class(position))
    mean, std = STATISTICS
    x, velocity = (given.pixels.float() / 255 - mean) / std, 0.0
    for step in range(2):
        torch.manual_seed(seed_for(5, "dm-network", step))
        network = build_student("convnet-3", 1, SIZE, CLASSES, width=4)
        drawn = torch.randperm(40, generator=generator_for(5, "dm-real", position, step))[:8]
        batch = (real(position)[drawn].float() / 255 - mean) / std
        x.requires_grad_()
        loss = (network.features(batch).flatten(1).mean(0) - network.features(x).flatten(1).mean(0)).pow(2).sum()  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(loss, [x])
        velocity = 0.5 * velocity + gradient
        x = x.detach() - 30.0 * velocity
    expected = ((x * std + mean) * 255).round().clamp(0, 255)
    found = method.make(given, None, nothing)["pixels"]
    assert (found.float() - expected).abs().max() <= 1
    assert (found != given.pixels).float().mean() > 0.3


def test_dm_brings_the_means_nearer_and_goes_on_from_a_state(monkeypatch: pytest.MonkeyPatch):
    assert_goes_on(dm(steps=5), part_of(dm(steps=5), of_class(2)), monkeypatch)
    method = dm(steps=60, lr=5.0)
    given = part_of(method, of_class(0, 4), real=lambda position: real(position))
    started = given.pixels.flip(3)  # bars in the wrong place
    moved = method.make(Given(**{**vars(given), "pixels": started}), None, nothing)["pixels"]
    goal = real(0).float().mean(dim=0)
    assert (moved.float().mean(dim=0) - goal).norm() < 0.9 * (started.float().mean(dim=0) - goal).norm()


def test_the_preparation_of_dm_serves_sets_of_all_sizes_and_ends_with_the_steps():
    method = dm(steps=1003)
    assert method.pieces(method.config, (40, 40)) == [(p, n) for p in range(2) for n in range(3)]
    short = dm(steps=3)
    means = short.prepare((1, 0), Inputs(**inputs_of()))["means"]
    assert means.shape == (3, 4 * 2 * 2)
    assert short.prepared_by == set(DM.Config.model_fields) - {"lr", "momentum"}
    padded = dm(pad_to=32).prepare((1, 0), Inputs(**inputs_of()))["means"]
    assert padded.shape == (2, 4 * 4 * 4)


def test_a_network_that_does_not_fit_is_refused_before_anything_runs():
    costs = Costs({}, (40,) * CLASSES, 2, SIZE, 1)
    for method in (DM, IDC):
        method.check(method.Config(), costs)
        for network, pad_to, reason in (
            ("convnet-5", None, "convnet-5 cannot take these images"), ("timm/resnet18", 32, "has batch norm"),
            ("convnet-4", None, None), ("resnetap-10", None, None), ("resnetap-10", 8, "normalises maps of a single pixel"),
            ("convnet3", None, "no student 'convnet3'"),
        ):  # fmt: skip
            config = method.Config(network=network, pad_to=pad_to)
            if reason is None:
                method.check(config, costs)
            else:
                small = Costs({}, (40,) * CLASSES, 2, 8 if pad_to == 8 else SIZE, 1)
                with pytest.raises(UserError, match=rf"synthesis.{method.name}.network: .*{reason}"):
                    method.check(config, small)


# IDC


def idc(**settings: Any) -> IDC:
    values = {
        "outer": 2, "inner": 2, "width": 4, "batch_size": 8, "lr": 2.0, "training_images": 20, "lr_size": SIZE, "pad_to": None,
        **settings,
    }  # fmt: skip
    return IDC(IDC.Config.model_validate(values))


def whole_set(k: int = 2) -> list[tuple[int, int]]:
    return [(position, number) for position in range(CLASSES) for number in range(k)]


def test_momentum_steps_are_steps_without_a_gradient():
    x, velocity = torch.randn(4), torch.randn(4)
    for steps in (0, 1, 4):
        parameter = nn.Parameter(x.clone())
        optimizer = torch.optim.SGD([parameter], lr=0.3, momentum=0.5)
        optimizer.state[parameter]["momentum_buffer"] = velocity.clone()
        for _ in range(steps):
            parameter.grad = torch.zeros_like(x)
            optimizer.step()
        images, left = momentum_steps(x, velocity, 0.3, 0.5, steps)
        torch.testing.assert_close(images, parameter.detach())
        torch.testing.assert_close(left, optimizer.state[parameter]["momentum_buffer"])


def test_idc_equals_one_optimiser_for_all_images():
    """The published loop, with one SGD for the images of all classes and PyTorch's own momentum."""
    method = idc(match_dsa=(), train_dsa=(), cutmix=0.0)
    given = part_of(method, whole_set())
    mean, std = STATISTICS
    every = torch.cat([real(position) for position in range(CLASSES)]).float() / 255
    truth = torch.arange(CLASSES).repeat_interleave(40)
    images = nn.Parameter(given.pixels.float() / 255)
    by = torch.optim.SGD([images], lr=2.0 * 2 / 10, momentum=0.5)
    for outer in range(2):
        torch.manual_seed(seed_for(5, "idc-network", outer))
        network = build_student("convnet-3", 1, SIZE, CLASSES, width=4)
        trained = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        images.data.clamp_(0, 1)
        for inner in range(2):
            for position in range(CLASSES):
                draws = generator_for(5, "idc-match", outer, inner, position)
                batch = real(position)[torch.randperm(40, generator=draws)[:8]].float() / 255
                weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
                sides = []
                for part, graph in ((batch, False), (images[2 * position : 2 * position + 2], True)):
                    labels = torch.full((len(part),), position)
                    loss = F.cross_entropy(network((part - mean) / std), labels)
                    sides.append(torch.autograd.grad(loss, weights, create_graph=graph))
                distance = sum((a.detach() - b).pow(2).sum() for a, b in zip(*sides, strict=True))
                by.zero_grad()
                distance.backward(inputs=[images])  # type: ignore[union-attr]
                by.step()
            order = torch.randperm(120, generator=generator_for(5, "idc-train", outer, inner))[:20]
            for index in order.split(8):
                trained.zero_grad()
                F.cross_entropy(network((every[index] - mean) / std), truth[index]).backward()
                trained.step()
    expected = (images.detach() * 255).round().clamp(0, 255)
    found = method.make(given, None, nothing)["pixels"].float()
    assert (found - expected).abs().max() <= 1
    assert (found != given.pixels).float().mean() > 0.3


def test_groups_of_classes_give_the_same_images():
    together = idc().make(part_of(idc(), whole_set()), None, nothing)["pixels"]
    grouped = idc(groups=2)
    parts = grouped.parts(grouped.config, CLASSES, 2)
    assert [sorted({position for position, _ in part}) for part in parts] == [[0], [1, 2]]
    apart = torch.cat([grouped.make(part_of(grouped, list(part)), None, nothing)["pixels"] for part in parts])
    assert torch.equal(together, apart)


def test_idc_goes_on_from_a_state(monkeypatch: pytest.MonkeyPatch):
    method = idc(pretraining_epochs=1, distance="l1", lr=0.05, most=1)
    assert_goes_on(method, part_of(method, whole_set()), monkeypatch)


def test_gradients_are_those_of_the_convolutions_alone():
    network = build_student("convnet-3", 1, SIZE, CLASSES, width=4)
    found = gradients(network, torch.rand(4, 1, SIZE, SIZE), torch.tensor([0, 1, 2, 0]))
    assert [tuple(each.shape) for each in found] == [(4, 1, 3, 3), (4, 4, 3, 3), (4, 4, 3, 3)]
    ones, threes = [torch.ones(2, 3)], [torch.full((2, 3), 3.0)]
    assert gradient_distance(ones, threes, "l1").item() == 12
    assert gradient_distance(ones, threes, "squared").item() == 24


# SRe2L


def sre2l(**settings: Any) -> SRe2L:
    return SRe2L(SRe2L.Config.model_validate({"steps": 2, "jpeg": None, "max_roll": 4, **settings}))


def diverging_sre2l() -> SRe2L:
    """Its images are clamped, so that only a learning rate diverges that no config can have."""
    return SRe2L(sre2l().config.model_copy(update={"lr": float("inf")}))


def test_the_distance_of_batch_norms_is_that_of_their_inputs(teacher: TeacherNetwork):
    distance = BatchNormDistance(teacher.encoder.network)
    images = torch.rand(6, 1, SIZE, SIZE, generator=rng(1))
    seen: list[tuple[nn.Module, Tensor]] = []
    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_hook(lambda norm, args, _: seen.append((norm, args[0]))) for norm in norms]
    teacher(images)
    found = distance.take()
    distance.remove()
    for hook in hooks:
        hook.remove()
    expected = 0.0
    for number, (norm, x) in enumerate(seen):
        flat = x.transpose(0, 1).flatten(1).double()
        mean = (flat.mean(1) - norm.running_mean).pow(2).sum().sqrt()  # type: ignore[operator]
        variance = ((flat - flat.mean(1, keepdim=True)).pow(2).mean(1) - norm.running_var).pow(2).sum().sqrt()  # type: ignore[operator]
        expected += (10 if number == 0 else 1) * float(mean + variance)
    assert len(seen) == len(norms) > 5
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_two_steps_of_sre2l_are_adam_on_its_loss(teacher: TeacherNetwork):
    method = sre2l(crop=False, max_roll=0, lr=0.05, bn_weight=0.3)
    part = [(position, 1) for position in range(CLASSES)]
    given = part_of(method, part, teacher=teacher, from_nothing=True)
    noise = [torch.randn(1, SIZE, SIZE, generator=generator_for(5, "sre2l-start", position, 1)) for position in range(CLASSES)]
    images = nn.Parameter(torch.stack(noise))
    adam, distance = torch.optim.Adam([images], lr=0.05, betas=(0.5, 0.9)), BatchNormDistance(teacher.encoder.network)
    for step in range(2):
        adam.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * step / 2)) / 2
        adam.zero_grad()
        scores = teacher(images * teacher.std + teacher.mean)
        (F.cross_entropy(scores, torch.arange(CLASSES)) + 0.3 * distance.take()).backward()
        adam.step()
        low, high = (0 - teacher.mean) / teacher.std, (1 - teacher.mean) / teacher.std
        images.data.clamp_(low, high)
    distance.remove()
    expected = ((images.detach() * teacher.std + teacher.mean) * 255).round()
    found = method.make(given, None, nothing)["pixels"].float()
    assert (found - expected).abs().max() <= 1


def test_sre2l_couples_images_of_one_number_and_different_classes():
    method = sre2l(batch_size=2)
    assert method.parts(method.config, CLASSES, 2) == [[(0, 0), (1, 0)], [(2, 0)], [(0, 1), (1, 1)], [(2, 1)]]


def test_sre2l_makes_what_the_teacher_recognises_and_goes_on_from_a_state(
    teacher: TeacherNetwork, monkeypatch: pytest.MonkeyPatch
):
    part = [(position, 0) for position in range(CLASSES)]
    method = sre2l(steps=6, crop_decay=True)
    assert_goes_on(method, part_of(method, part, teacher=teacher), monkeypatch)
    monkeypatch.undo()
    method = sre2l(steps=60, lr=0.05, crop=False, max_roll=0, bn_weight=0.0)
    made = method.make(part_of(method, part, teacher=teacher), None, nothing)["pixels"]
    before, after = (
        F.cross_entropy(teacher(pixels.float() / 255), torch.arange(CLASSES)).item()
        for pixels in (part_of(method, part).pixels, made)
    )
    assert after < 0.9 * before


def test_a_teacher_without_batch_norm_is_refused():
    shape = EncoderConfig(
        model="vit_tiny_patch16_224", channels=1,
        model_args={"img_size": SIZE, "patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 2},
         num_classes=3, mean=0.0, std=1.0,
    )  # fmt: skip
    with pytest.raises(UserError, match="needs a teacher with batch norm, such as a ResNet, and vit_tiny_patch16_224 has none"):
        SRe2L.check(SRe2L.Config(), Costs({}, (40,) * CLASSES, 2, SIZE, 1, shape))


def test_every_image_of_a_batch_is_cropped_mirrored_and_rolled_alike():
    image = torch.rand(1, 1, SIZE, SIZE, generator=rng(2))
    found = augmented(image.expand(4, -1, -1, -1), rng(3), 0.3, 5)
    assert all(torch.equal(found[0], other) for other in found)
    rolled = augmented(image, rng(3), None, 5)
    assert sorted(rolled.flatten().tolist()) == sorted(image.flatten().tolist())


def test_the_smallest_crop_falls_by_a_cosine_where_it_shall():
    method = sre2l(steps=100, crop_decay=True)
    assert [method._smallest(step) for step in (0, 50, 100)] == pytest.approx([1, 0.54, 0.08])
    assert sre2l()._smallest(1) == 0.08
    assert sre2l(crop=False)._smallest(1) is None


# RDED


def rded(**settings: Any) -> RDED:
    return RDED(RDED.Config.model_validate({"images_per_class": 20, "crops": 3, "jpeg": None, **settings}))


def test_crops_are_square_boxes_of_the_file():
    ramp = Image.fromarray(torch.arange(48)[None].expand(32, -1).to(torch.uint8).numpy())
    found = crops_of(ramp, 8, 200, (0.08, 1.0), rng())
    assert found.shape == (200, 1, 8, 8)
    widths = (found[:, 0, 4, -1].float() - found[:, 0, 4, 0].float()) * 8 / 7
    areas = (widths / 32) ** 2 * (32 * 32) / (32 * 48)
    assert 0.05 < areas.min() < 0.15
    assert areas.max() <= 1


def test_the_best_crops_make_the_mosaics_in_the_order_of_their_ranks():
    ranked = torch.arange(8, dtype=torch.uint8).reshape(8, 1, 1, 1).expand(8, 1, 3, 3)
    found = mosaics(ranked, 2, 7)
    assert found.shape == (2, 1, 7, 7)
    for image in range(2):
        corners = found[image, 0][[0, 0, 6, 6], [0, 6, 0, 6]].tolist()
        assert corners == [image, image + 2, image + 4, image + 6]
        assert found[image, 0, 3, 3] == image, "the first part of a side that is not divisible is one pixel longer"


def test_rded_takes_the_crops_with_the_least_loss_of_the_teacher(teacher: TeacherNetwork):
    method, position = rded(), 1
    given = part_of(method, of_class(position), teacher=teacher)
    pieces = [method.prepare(piece, Inputs(**inputs_of(teacher=teacher))) for piece in method.pieces(method.config, (40, 40))]
    assert len(pieces) == 2
    drawn = torch.randperm(40, generator=generator_for(5, "rded", position))[:20].tolist()
    losses, crops = [], []
    for index in drawn:
        if index == 7:
            continue
        tried = crops_of(Files().image(position, index), 8, 3, (0.08, 1.0), generator_for(5, "rded-crops", position, index))
        padded = teacher.mean.expand(3, 1, SIZE, SIZE).clone()
        padded[:, :, 4:12, 4:12] = tried.float() / 255
        loss = -teacher(padded).log_softmax(dim=1)[:, position]
        losses.append(loss.min().item())
        crops.append(tried[loss.argmin()])
    best = sorted(range(len(losses)), key=lambda i: losses[i])[:8]
    found = method.make(given, None, nothing)["pixels"]
    assert torch.equal(found, mosaics(torch.stack([crops[i] for i in best]), 2, SIZE))


def test_sets_of_all_sizes_share_the_crops_of_rded():
    method = rded(images_per_class=120)
    assert method.pieces(method.config, (40, 200)) == [(0, 0), (1, 0), (1, 1), (1, 2)]
    assert method.prepared_by == set(RDED.Config.model_fields) - {"jpeg"}


def test_too_few_images_for_a_mosaic_are_an_error(teacher: TeacherNetwork):
    method, message = (
        rded(images_per_class=6),
        r"2 mosaics of 2×2 images take 8 real images of a class, and there are 6 \(of 40",
    )
    with pytest.raises(UserError, match=message):
        RDED.check(method.config, Costs({}, (60, 40), 2, SIZE, 1))
    RDED.check(rded(images_per_class=8).config, Costs({}, (60, 40), 2, SIZE, 1))
    with pytest.raises(UserError, match=r"factor=20 is more than the 16 pixels"):
        RDED.check(rded(factor=20).config, Costs({}, (60, 40), 2, SIZE, 1))
    method = rded(images_per_class=40, crops=1)
    given = part_of(method, of_class(1, 10), teacher=teacher)
    with pytest.raises(UserError, match="take 40 real images of a class, and there are 39"):  # one of the 40 files is broken
        method.make(given, None, nothing)
    for crop in ((0.0, 1.0), (1.0, 0.5), (0.5, 1.5)):
        with pytest.raises(ValidationError, match="no range of areas"):
            RDED.Config(crop=crop)


@pytest.mark.parametrize("method", [dm(lr=1e30), idc(lr=1e30, match_dsa=()), diverging_sre2l()], ids=lambda m: m.name)
def test_an_optimisation_that_diverges_is_an_error(method: Synthesis, teacher: TeacherNetwork):
    part = whole_set() if method.name == "idc" else of_class(1)
    with pytest.raises(UserError, match="are not finite"):
        method.make(part_of(method, part, teacher=teacher), None, nothing)


def test_networks_have_the_same_weights_whatever_the_device(monkeypatch: pytest.MonkeyPatch):
    """They are drawn on the CPU: a device that draws for itself would have other numbers."""
    expected = [parameter.clone() for parameter in FreshNetworks("convnet-3", 4, 1, SIZE, CLASSES, "cpu")(3).parameters()]
    drawn: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "to", lambda self, device: (drawn.append(self), self)[1])
    network = FreshNetworks("convnet-3", 4, 1, SIZE, CLASSES, "cuda")(3)
    assert drawn == [network]
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), expected, strict=True))


def test_without_training_images_the_networks_stay_as_they_are(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    monkeypatch.setattr(Matching, "train", lambda *arguments: calls.append(1))
    method = idc(training_images=0)
    method.make(part_of(method, whole_set()), None, nothing)
    assert calls == []


def test_published_sets_are_jpeg(teacher: TeacherNetwork):
    plain = rded().make(part_of(rded(), of_class(0), teacher=teacher), None, nothing)["pixels"]
    found = rded(jpeg=75).make(part_of(rded(jpeg=75), of_class(0), teacher=teacher), None, nothing)["pixels"]
    buffer = io.BytesIO()
    Image.fromarray(plain[1, 0].numpy()).save(buffer, "JPEG", quality=75)
    assert found[1, 0].flatten().tolist() == list(Image.open(buffer).tobytes())


@pytest.mark.parametrize("method", [DM, IDC, SRe2L, RDED])
def test_costs_grow_with_the_images(method: type[Synthesis]):
    config = method.Config()
    few, many = (Costs({"teacher": 10.0}, (40,) * CLASSES, k, 32, 3) for k in (1, 10))
    assert method.flops(config, many) >= method.flops(config, few)
    assert method.preparation_flops(config, many) == method.preparation_flops(config, few)
    assert method.flops(config, many) + method.preparation_flops(config, many) > 0
    bytes_of = {DM: 4 * 20000 * CLASSES * 2048, RDED: 40 * CLASSES * 3 * 16 * 16}
    assert method.preparation_bytes(config, many) == bytes_of.get(method, 0)


def test_a_network_without_convolutions_is_refused(monkeypatch: pytest.MonkeyPatch):
    def mlp(channels: int, size: int, num_classes: int, norm: str, width: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, num_classes))

    monkeypatch.setitem(STUDENTS, "mlp", mlp)
    for method in (DM, IDC):
        with pytest.raises(UserError, match=rf"synthesis.{method.name}.network: mlp is no convolutional network"):
            method.check(method.Config(network="mlp"), Costs({}, (40,) * CLASSES, 2, SIZE, 1))


def test_a_setting_of_sre2l_without_effect_is_refused():
    with pytest.raises(ValidationError, match="crop_decay=true has no effect with crop=false"):
        SRe2L.Config(crop=False, crop_decay=True)


def test_progress_of_idc_counts_the_pretraining(monkeypatch: pytest.MonkeyPatch):
    """With 2 epochs of all 120 images before 2 matches, which are followed by 20 images each."""
    monkeypatch.setattr(saving, "SAVE_EVERY_S", 0.0)
    method, shares = idc(pretraining_epochs=2, outer=1), []
    method.make(part_of(method, whole_set()), None, lambda state, done=0.0: shares.append(done))
    match = 3 * (3 * 8 + 9 * 2) + 3 * 20
    whole = 2 * 3 * 120 + 2 * match
    assert shares == pytest.approx([360 / whole, 720 / whole, (720 + match) / whole, 1.0])


class Flat:
    """A generator whose latents are the pixels, and which expects grey."""

    schedule = NoiseSchedule()

    def label(self, position: int) -> int:
        return position + 7

    def predictor(self, position: int, count: int) -> Any:
        return lambda z, t_B: 0.5 * z

    def latents(self, given: Given) -> Tensor:
        return given.pixels.float() / 127.5 - 1

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def test_cao2_goes_on_after_the_batches_that_are_refined(monkeypatch: pytest.MonkeyPatch):
    method = CaO2(CaO2.Config(steps=3, lr=0.05, batch_size=2))
    given = part_of(method, of_class(1, 7), generator=Flat())
    assert_goes_on(method, given, monkeypatch)
