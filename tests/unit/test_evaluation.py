"""Students and their training: shapes, schedules, losses, what is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ims3_ray import saving
from ims3_ray.config import AugmentConfig, ProtocolConfig
from ims3_ray.config.evaluation import for_ipc
from ims3_ray.data.augment import padded
from ims3_ray.errors import Diverged, UserError
from ims3_ray.models.student_costs import forward_flops
from ims3_ray.models.students import build_student, student_builder, tried_out
from ims3_ray.training import augmented
from ims3_ray.training import students as students_module
from ims3_ray.training.accuracy import accuracy_of, confusion_of, resident, validation_epochs
from ims3_ray.training.augmented import AugmentedBatches, scale_of
from ims3_ray.training.students import LabelledSet, Student, Training, _optimizer, decay_factor, soft_label_loss, train_student

PUBLISHED = {
    ("convnet-3", 28): 0, ("convnet-6", 224): 754_570, ("convnet-6", 256): 763_530, ("resnetap-10", 224): 4_910_922,
    ("resnet-18", 224): 11_181_642, ("resnet-50", 224): 23_528_522, ("resnet-101", 224): 42_520_650,
}  # fmt: skip


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_students_have_the_published_parameters_and_give_logits(name: str, size: int):
    with torch.device("meta"):
        student = build_student(name, 3, size, 10)
        assert student(torch.zeros(2, 3, size, size)).shape == (2, 10)
    if expected := PUBLISHED[name, size]:
        assert sum(p.numel() for p in student.parameters()) == expected


@pytest.mark.parametrize("size", [28, 32, 64, 128, 256])
@pytest.mark.parametrize("name", ["convnet-3", "resnetap-10", "resnet-18", "resnet-50", "timm/vit_tiny_patch16_224"])
def test_students_take_images_of_every_size(name: str, size: int):
    if name.startswith("timm") and size == 28:
        size = 48
    with torch.device("meta"):
        assert build_student(name, 1, size, 7)(torch.zeros(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet-18", "resnet-50"])
def test_resnets_are_torchvisions(name: str):
    import torchvision

    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name.replace("-", ""))(num_classes=5).eval()
    mine = build_student(name, 3, 160, 5, norm="batch").eval()
    mine.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        torch.testing.assert_close(mine(x), theirs(x))


def test_resnetap_pools_where_resnet_strides():
    student = build_student("resnetap-10", 3, 256, 10)
    assert all(m.stride == (1, 1) for m in student.modules() if isinstance(m, nn.Conv2d))
    assert [m.kernel_size for m in student.modules() if isinstance(m, nn.AvgPool2d)] == [4] + [2] * 6
    with torch.no_grad():
        assert student.layer4(student.layer3(student.layer2(student.layer1(torch.zeros(1, 64, 32, 32))))).shape[-1] == 4


def test_the_flops_of_a_convnet_are_those_of_its_convolutions():
    expected = 2 * (28**2 * 9 * 1 * 32 + 14**2 * 9 * 32 * 32 + 7**2 * 9 * 32 * 32 + 32 * 9 * 10)
    assert forward_flops("convnet-3", 1, 28, 10, "instance", 32) == expected


def test_an_unknown_student_is_refused():
    for name in ("resnet-19", "convnet", "timm/no_such_net"):
        with pytest.raises(UserError, match="there is convnet-DEPTH"):
            student_builder(name)


def test_tables_by_images_per_class():
    table = {1: 3000, 10: 2000, 50: 1500}
    assert [for_ipc(table, ipc) for ipc in (1, 2, 10, 11, 50, 51, 500)] == [3000, 2000, 2000, 1500, 1500, 1500, 1500]
    assert for_ipc(7, 50) == 7


@pytest.mark.parametrize("epochs", [30, 31, 1300])
def test_the_learning_rate_follows_torchs_schedulers(epochs: int):
    weight = [nn.Parameter(torch.zeros(1))]
    for kind, build in (
        ("cosine", lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, epochs)),
        ("steps", lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2 * epochs // 3, 5 * epochs // 6], 0.2)),
    ):
        optimizer = torch.optim.SGD(weight, lr=1.0)
        scheduler = build(optimizer)
        for epoch in range(epochs):
            assert decay_factor(kind, epoch, epochs) == pytest.approx(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    halves = [decay_factor("half_cosine", epoch, 30) for epoch in (0, 15, 30)]
    assert halves == pytest.approx([1, 0.5 * (1 + math.cos(math.pi / 4)), 0.5])
    assert [decay_factor("halfway", epoch, 1000) for epoch in (0, 500, 501, 999)] == [1, 1, 0.1, 0.1]


def test_validations_are_evenly_spaced_and_end_with_the_last_epoch():
    assert validation_epochs(10, 5, 0.0) == {2, 4, 6, 8, 10}
    assert validation_epochs(300, 6, 0.8) == {250, 260, 270, 280, 290, 300}
    assert validation_epochs(2, 100, 0.0) == {1, 2}


def test_soft_labels_lose_the_divergence_of_the_softened_classes():
    torch.manual_seed(0)
    student, teacher, T = torch.randn(4, 6), torch.randn(4, 6), 20.0
    expected = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q = [math.exp(v / T) for v in s]
        p = [math.exp(v / T) for v in t]
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / len(student)
    assert soft_label_loss(student, teacher, T).item() == pytest.approx(expected, rel=1e-4)
    assert soft_label_loss(teacher, teacher, T).item() == pytest.approx(0, abs=1e-7)


STEPS = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
"""An image whose pixels are not all equal."""


def test_adamw_decays_matrices_only():
    student = Student("convnet-1", STEPS, 3, ProtocolConfig(optimizer="adamw"))
    decayed, free = _optimizer(student, ProtocolConfig(optimizer="adamw", weight_decay=0.01)).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0)
    assert {p.dim() for p in free["params"]} == {1}
    assert {p.dim() for p in decayed["params"]} == {2, 4}


def test_test_images_are_cropped_and_scaled_once():
    pixels = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    assert (resident(pixels, 8) == pixels).all()
    assert (resident(pixels, 4, 0.5) == pixels[..., 2:6, 2:6]).all()
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    assert (resident(flat, 5) == 77).all()


def bars(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes of 8×8 images, told apart by where they are bright."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat(count)
    images = torch.randint(0, 80, (len(labels), 1, 8, 8), generator=rng)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, :, 2 * label : 2 * label + 3] += 120
    return images.to(torch.uint8), labels


def quick(**changes: Any) -> ProtocolConfig:
    return ProtocolConfig(**{"width": 16, "epochs": 30, "validations": 3, "lr": 0.05, "augment": {}, **changes})


def test_a_student_learns_what_can_be_learnt_and_the_same_seed_learns_the_same():
    train, test, val = bars(4, 1), bars(20, 2), bars(5, 3)
    student, accuracy = train_student("convnet-2", train, test, 3, quick(), 0, val=val)
    assert accuracy.last > 80
    assert accuracy.last == accuracy.curve[-1].test == pytest.approx(accuracy_of(student, test, 3))
    assert accuracy.best == max(check.test for check in accuracy.curve)
    chosen = max(accuracy.curve, key=lambda check: check.val)
    assert accuracy.val == chosen.test
    assert [check.epoch for check in accuracy.curve] == [10, 20, 30]
    assert accuracy.confusion.sum(dim=1).tolist() == [20, 20, 20]
    assert 100 * accuracy.confusion.trace().item() / 60 == pytest.approx(accuracy.last)
    assert accuracy.curve[-1].loss < accuracy.curve[0].loss
    again = train_student("convnet-2", train, test, 3, quick(), 0, val=val)[1]
    assert again.curve == accuracy.curve
    assert train_student("convnet-2", train, test, 3, quick(), 1)[1].curve != accuracy.curve


def test_an_interrupted_training_goes_on_to_the_same_student(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saving, "SAVE_EVERY_S", 0.0)
    train, test, val = bars(4, 1), bars(5, 2), bars(2, 3)
    protocol = quick(optimizer="adamw", lr=0.01, augment={"max_shift": 1, "flip": True}, cutmix=True, norm="batch")
    saved: list[tuple[bytes, float]] = []

    def save(state: bytes, done: float = 0.0) -> None:
        saved.append((state, done))

    student, accuracy = train_student("convnet-2", train, test, 3, protocol, 0, val=val, save=save)
    assert [done for _, done in saved] == pytest.approx([epoch / 30 for epoch in range(1, 30)])
    for state, _ in (saved[index] for index in (2, 9, 14, 19, 28)):  # some of them right after one of three validations
        again, same = train_student("convnet-2", train, test, 3, protocol, 0, val=val, resume=state)
        assert same.curve == accuracy.curve
        assert torch.equal(same.confusion, accuracy.confusion)
        for mine, other in zip(again.parameters(), student.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_an_interrupted_training_with_dropout_goes_on_to_the_same_student(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saving, "SAVE_EVERY_S", 0.0)
    build = students_module.build_student

    def with_dropout(*arguments: Any) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.3), build(*arguments))

    monkeypatch.setattr(students_module, "build_student", with_dropout)
    saved: list[bytes] = []
    train, test = bars(4, 1), bars(5, 2)
    student, _ = train_student("convnet-1", train, test, 3, quick(), 0, save=lambda state, _done=0.0: saved.append(state))
    again, _ = train_student("convnet-1", train, test, 3, quick(), 0, resume=saved[0])
    for mine, other in zip(again.parameters(), student.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_a_state_that_was_saved_on_another_kind_of_device_is_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(saving, "SAVE_EVERY_S", 0.0)
    saved: list[bytes] = []
    train, test = bars(4, 1), bars(5, 2)
    whole = train_student("convnet-1", train, test, 3, quick(), 0, save=lambda state, _done=0.0: saved.append(state))[1]
    state = saving.unpack_state(saved[0], "cpu")
    state["training"] |= {"kind": "cuda", "rng": torch.zeros(16, dtype=torch.uint8)}
    saving.Saver(lambda state, _done=0.0: saved.append(state))(0.5, **state)
    anew = train_student("convnet-1", train, test, 3, quick(), 0, resume=saved[-1])[1]
    assert anew.curve == whole.curve


def test_without_held_out_images_nothing_is_chosen_by_them():
    accuracy = train_student("convnet-1", bars(1, 1), bars(1, 2), 3, quick(epochs=1, validations=1), 0)[1]
    assert accuracy.val is None
    assert accuracy.curve[0].val is None


def test_the_whole_of_the_published_protocols_runs_on_colour_images():
    pixels, labels = bars(2, 1)
    colour = pixels.expand(-1, 3, -1, -1).contiguous(), labels
    everything = {"crop": (0.5, 1), "flip": True, "jitter": 0.4, "lighting": 0.1}
    protocol = quick(
        normalise="imagenet", augment=everything, cutmix=True, decay="steps", size=16, batch_size={1: 2, 10: 4},
        test_crop=0.875, epochs=3, norm="batch", precision="bf16",
    )  # fmt: skip
    tested = resident(colour[0], 16, 0.875), colour[1]
    accuracy = train_student("resnetap-10", colour, tested, 3, protocol, 0)[1]
    with pytest.raises(ValueError, match="test holds images of 8 pixels, and students take 16"):
        train_student("resnetap-10", colour, colour, 3, protocol, 0)
    assert all(math.isfinite(check.loss) for check in accuracy.curve)


def test_a_teacher_labels_each_batch_as_the_student_sees_it():
    train, test = bars(4, 1), bars(20, 2)
    seen = []

    def teacher(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return 50 * torch.stack([images[:, :, :, 2 * c : 2 * c + 3].mean(dim=(1, 2, 3)) for c in range(3)], dim=1)

    wrong = torch.zeros_like(train[1])  # which hard labels would learn
    protocol = quick(labels="soft", temperature=1.0, cutmix=True)
    accuracy = train_student("convnet-2", (train[0], wrong), test, 3, protocol, 0, teacher=teacher)[1]
    assert accuracy.last > 70
    assert all(images.min() >= 0 and images.max() <= 1 for images in seen)
    assert not any((F.interpolate(images, 8) == train[0][:1] / 255).all() for images in seen)


def test_soft_labels_without_a_teacher_are_refused():
    with pytest.raises(ValueError, match="need a teacher"):
        train_student("convnet-1", bars(1, 1), bars(1, 2), 3, quick(labels="soft"), 0)


def test_a_last_batch_of_one_image_does_not_stop_batch_norm():
    pixels, labels = bars(3, 1)  # nine images in batches of four
    accuracy = train_student(
        "convnet-3", (pixels, labels), (pixels, labels), 3, quick(norm="batch", batch_size=4, epochs=2), 0
    )[1]
    assert math.isfinite(accuracy.curve[-1].loss)


def test_confusion_counts_images_by_class_and_answer():
    class Brightest(Student):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.float().flatten(1)[:, :3]

    student = Brightest("convnet-1", STEPS, 3, quick())
    pixels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    for image, answer in zip(pixels, (0, 2, 2, 1), strict=True):
        image[0, 0, answer] = 9
    assert confusion_of(student, (pixels, torch.tensor([0, 0, 2, 1])), 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 1]]


def test_weights_of_images_weigh_their_losses_and_equal_ones_change_nothing():
    g = torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(0, 256, (8, 1, 8, 8), generator=g, dtype=torch.uint8), torch.arange(8) % 2
    protocol = ProtocolConfig(width=8, epochs=2, batch_size=8, augment=AugmentConfig())
    plain = Training("convnet-2", (pixels, labels), 2, protocol, 0)
    index = torch.arange(8)
    alone = torch.stack(
        [F.cross_entropy(plain.student.scores(pixels[i : i + 1].float() / 255), labels[i : i + 1]) for i in range(8)]
    )
    torch.testing.assert_close(plain._loss(plain.batches._batch(index)), alone.mean())
    weights = torch.tensor([3.0, 1, 0, 0, 2, 2, 0, 0])
    weighed = Training("convnet-2", LabelledSet(pixels, labels, weights=weights), 2, protocol, 0)
    torch.testing.assert_close(weighed._loss(weighed.batches._batch(index)), (alone * weights / weights.mean()).mean())
    even = Training("convnet-2", LabelledSet(pixels, labels, weights=torch.full((8,), 5.0)), 2, protocol, 0)
    torch.testing.assert_close(even._loss(even.batches._batch(index)), alone.mean())


def test_stored_soft_labels_take_the_place_of_a_teacher():
    g = torch.Generator().manual_seed(0)
    pixels, labels = torch.randint(0, 256, (6, 1, 8, 8), generator=g, dtype=torch.uint8), torch.arange(6) % 2
    logits = torch.randn(6, 2, generator=g)
    protocol = ProtocolConfig(width=8, epochs=1, batch_size=6, labels="stored", temperature=4.0, augment=AugmentConfig())
    training = Training("convnet-2", LabelledSet(pixels, labels, logits=logits), 2, protocol, 0)
    scores = training.student.scores(pixels.float() / 255)
    wanted, found = (logits / 4).softmax(dim=1), (scores / 4).log_softmax(dim=1)
    expected = (wanted * (wanted.log() - found)).sum(dim=1)
    torch.testing.assert_close(training._loss(training.batches._batch(torch.arange(6))), expected.mean())
    weights = torch.tensor([1.0, 2, 3, 0, 0, 0])
    weighed = Training("convnet-2", LabelledSet(pixels, labels, logits, weights), 2, protocol, 0)
    torch.testing.assert_close(weighed._loss(weighed.batches._batch(torch.arange(6))), (expected * weights).mean())
    with pytest.raises(ValueError, match="no stored soft labels"):
        Training("convnet-2", (pixels, labels), 2, protocol, 0)


def test_a_student_that_diverges_is_an_error_of_one_line():
    train = bars(4, 1)
    with pytest.raises(Diverged, match=r"diverged|not finite") as refused:
        train_student("convnet-2", train, bars(2, 2), 3, quick(lr=1e20, optimizer="sgd"), 0)
    assert "lr" in str(refused.value)


def test_a_set_of_equal_grey_images_is_refused():
    grey = torch.full((6, 1, 8, 8), 128, dtype=torch.uint8), torch.arange(6) % 3
    with pytest.raises(UserError, match="all pixels of the set have the same value"):
        train_student("convnet-2", grey, bars(2, 2), 3, quick(), 0)


def test_scores_that_are_not_finite_are_no_predictions():
    class Broken(Student):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.full((len(pixels), 3), float("nan"))

    with pytest.raises(Diverged, match="scores are not finite"):
        confusion_of(Broken("convnet-1", STEPS, 3, quick()), bars(2, 2), 3)


@pytest.mark.parametrize("name", ["resnet-18", "timm/resnet10t", "convnet-3"])
def test_a_last_batch_of_one_is_left_out_where_batch_statistics_need_more(name: str):
    """Seven images in batches of three: the last batch of an epoch holds one image."""
    pixels, labels = bars(7, 1)
    train = torch.nn.functional.interpolate(pixels.float(), 32).to(torch.uint8)[:7], labels[:7]
    test = torch.nn.functional.interpolate(bars(2, 2)[0].float(), 32).to(torch.uint8), bars(2, 2)[1]
    _, accuracy = train_student(name, train, test, 3, quick(norm="batch", batch_size=3, epochs=1, validations=1), 0)
    assert math.isfinite(accuracy.curve[0].loss)


def test_batches_of_one_with_batch_norm_are_refused():
    with pytest.raises(UserError, match=r"normalises over the images of a batch.*the batch size is 1"):
        train_student("resnet-18", bars(2, 1), bars(2, 2), 3, quick(norm="batch", batch_size=1), 0)


@pytest.mark.parametrize(("name", "size", "fits"), [("convnet-3", 8, True), ("resnet-18", 8, False), ("resnet-18", 16, True)])
def test_instance_norm_of_maps_of_one_pixel_is_refused(name: str, size: int, fits: bool):
    """An instance norm of one value gives zero whatever the image is, so such a network never learns."""
    found = tried_out(name, 1, size, 3, "instance", 8)[1]
    assert (found is None) == fits
    assert tried_out(name, 1, size, 3, "batch", 8)[1] is None


def test_grey_images_reach_convolutions_with_the_strides_of_their_shape():
    """With those of channels last, PyTorch's group norm takes several times as long on CPUs."""
    hwc = torch.rand(4, 8, 8, 1).permute(0, 3, 1, 2)
    for images in (padded(hwc, None), padded(hwc, 10)):
        assert nn.Conv2d(1, 4, 3)(images).is_contiguous()
    assert torch.equal(padded(hwc, None), hwc)
    colour = torch.rand(4, 3, 8, 8)
    assert padded(colour, None) is colour


def test_images_of_28_pixels_are_padded_to_32_as_by_a_first_convolution_with_padding_3():
    protocol = quick(pad_to=32, width=8)
    images = torch.randint(256, (6, 1, 28, 28), dtype=torch.uint8)
    torch.manual_seed(0)
    student = Student("convnet-3", images, 4, protocol)
    assert student.net.classifier.in_features == 8 * 4 * 4  # type: ignore[union-attr]
    first = student.net.features[0]  # type: ignore[union-attr]
    normalised = (images.float() / 255 - student.mean) / student.std
    wide = torch.nn.functional.conv2d(normalised, first.weight, first.bias, padding=3)
    hooked = []
    first.register_forward_hook(lambda _module, _inputs, output: hooked.append(output))
    student(images)
    torch.testing.assert_close(hooked[0], wide)


def test_a_second_pass_updates_batch_norm_twice_a_step():
    images = torch.randint(256, (8, 1, 16, 16), dtype=torch.uint8)
    labels = torch.arange(8) % 2
    counts = {}
    for twice in (False, True):
        training = Training(
            "convnet-2", (images, labels), 2, quick(norm="batch", width=4, cutmix=True, second_pass=twice, batch_size=4), 0
        )
        training.epoch()
        (norm, *_) = [m for m in training.student.modules() if isinstance(m, nn.BatchNorm2d)]
        counts[twice] = int(norm.num_batches_tracked)  # type: ignore[arg-type]
    assert counts == {False: 2, True: 4}


def test_cutmix_may_be_applied_to_some_batches(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    real = augmented.cutmix
    monkeypatch.setattr(augmented, "cutmix", lambda *arguments: (calls.append(1), real(*arguments))[1])
    images, labels = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
    for share, low, high in ((0.0, 0, 0), (0.5, 5, 35), (1.0, 40, 40)):
        calls.clear()
        training = Training("convnet-1", (images, labels), 2, quick(cutmix=share, width=2, batch_size=10), 0)
        for _ in range(10):
            training.epoch()
        assert low <= len(calls) <= high


def test_convnets_keep_pytorchs_initialisation():
    torch.manual_seed(3)
    network = build_student("convnet-3", 3, 32, 10, width=16)
    convolution = network.features[4]  # type: ignore[union-attr]
    bound = 1 / math.sqrt(16 * 9)  # of kaiming_uniform with a = √5, PyTorch's default
    assert convolution.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert convolution.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_stored_labels_belong_to_the_batches_that_every_student_sees():
    """Students of different seeds see the same batches, and learn from stored labels what the teacher would have said."""
    images, labels = torch.randint(256, (10, 1, 12, 12), dtype=torch.uint8), torch.arange(10) % 2
    augment = {"max_shift": 3, "flip": True}
    protocol = quick(labels="stored_batches", cutmix=0.5, batch_size=4, width=4, epochs=3, augment=augment)
    torch.manual_seed(1)
    network = nn.Linear(144, 2).requires_grad_(False)

    def teacher(batch: torch.Tensor) -> torch.Tensor:
        return network(batch.flatten(1))

    stream = AugmentedBatches(images, protocol, 4, scale_of(images, protocol), 7, "cpu", shared=True)
    stored = {number: torch.cat([teacher(batch.images) for batch in stream.epoch(number)]) for number in (2, 0, 1)}
    seen: list[torch.Tensor] = []
    for seed in (0, 1):
        training = Training("convnet-2", (images, labels), 2, protocol, seed, batch_labels=stored.__getitem__)
        scores = training.student.scores
        training.student.scores = lambda batch, scores=scores: seen.append(batch) or scores(batch)  # type: ignore[method-assign]
        for number in range(3):
            seen.clear()
            training.epoch()
            torch.testing.assert_close(stored[number], torch.cat([teacher(batch) for batch in seen]))
    assert len({stored[number].numpy().tobytes() for number in range(3)}) == 3, "every epoch is augmented anew"
    with pytest.raises(ValueError, match="batch_labels"):
        Training("convnet-2", (images, labels), 2, protocol, 0)


def test_a_protocol_normalises_by_the_real_images_if_it_says_so():
    images = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.1, 0.2, 0.3]).reshape(3, 1, 1), torch.tensor([0.4, 0.5, 0.6]).reshape(3, 1, 1)
    training = Training("convnet-2", (images, torch.arange(6) % 2), 2, quick(normalise="real"), 0, statistics=(mean, std))
    seen: list[torch.Tensor] = []
    training.student.net.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    training.student(images)
    torch.testing.assert_close(seen[0], (images.float() / 255 - mean) / std)
    with pytest.raises(ValueError, match="normalise: real needs the statistics"):
        Training("convnet-2", (images, torch.arange(6) % 2), 2, quick(normalise="real"), 0)
