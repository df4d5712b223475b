"""Batched augmentation, against torchvision's transforms of single images and against what was asked for."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ims3_ray.config import AugmentConfig
from ims3_ray.data.augment import (
    EIGENVALUES,
    EIGENVECTORS,
    LUMA,
    ORDERS,
    Scale,
    augment,
    crop_boxes,
    cropped,
    cutmix,
    jittered,
    lit,
    mirrored,
    rand_augmented,
    shifted,
    shuffled_patches,
    uniform,
)
from ims3_ray.data.siamese import drawn_families


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int = 6, channels: int = 3, size: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=rng(seed))


def test_a_crop_is_that_of_torchvision():
    from torchvision.transforms.v2 import functional as tv

    images = pictures()
    boxes = torch.tensor([[0, 0, 12, 12], [2, 3, 5, 7], [0, 5, 9, 4], [7, 7, 5, 5], [1, 1, 10, 3], [4, 0, 1, 2]])
    found = cropped(images, boxes, 8)
    for image, box, mine in zip(images, boxes.tolist(), found, strict=True):
        torch.testing.assert_close(mine, tv.resized_crop(image, *box, [8, 8], antialias=False), atol=1e-5, rtol=0)


def test_boxes_are_distributed_as_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    count, scale = 4000, (0.25, 1.0)
    boxes = crop_boxes(count, 60, 60, scale, rng())
    top, left, h, w = boxes.unbind(dim=1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + h <= 60).all()
    assert (left + w <= 60).all()
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(torch.zeros(1, 60, 60), scale, (3 / 4, 4 / 3)) for _ in range(count)])
    for mine, other in zip((h * w / 3600, (w / h).log(), top / 60, left / 60), _measures(theirs), strict=True):
        error = 4 * other.std() / math.sqrt(count) * math.sqrt(2)
        assert abs(mine.mean() - other.mean()) < error
        assert mine.std() == pytest.approx(other.std().item(), rel=0.06)


def _measures(boxes: torch.Tensor) -> tuple[torch.Tensor, ...]:
    top, left, h, w = boxes.float().unbind(dim=1)
    return h * w / 3600, (w / h).log(), top / 60, left / 60


def test_a_box_that_never_fits_is_the_whole_image():
    assert (crop_boxes(5, 10, 10, (1.2, 1.3), rng()) == torch.tensor([0, 0, 10, 10])).all()


def test_jitter_is_torchvisions_in_each_images_order():
    from torchvision.transforms.v2 import functional as tv

    images, strength = 0.4 + 0.2 * pictures(24), 0.2  # so grey that torchvision has nothing to clamp
    found = jittered(images, strength, rng(3))
    draws = rng(3)
    factors = uniform(72, 1 - strength, 1 + strength, draws).reshape(3, 24)
    orders = torch.randint(len(ORDERS), (24,), generator=draws)
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    assert len(orders.unique()) == len(ORDERS)
    for b, image in enumerate(images):
        for which in ORDERS[orders[b]]:
            image = adjust[which](image, factors[which, b].item())
        torch.testing.assert_close(found[b], image, atol=2e-3, rtol=0)  # torchvision weighs red by 0.2989


def test_jitter_leaves_the_saturation_of_grey_images_alone():
    grey = pictures(8, channels=1)
    coloured = jittered(grey.expand(-1, 3, -1, -1), 0.4, rng(5))
    torch.testing.assert_close(jittered(grey, 0.4, rng(5)).expand(-1, 3, -1, -1), coloured, atol=1e-5, rtol=0)
    assert sum(LUMA) == pytest.approx(1)


def test_lighting_has_the_covariance_of_imagenets_colours():
    noise = lit(torch.zeros(40_000, 3, 1, 1), 0.1, rng()).flatten(1)
    vectors, values = torch.tensor(EIGENVECTORS), torch.tensor(EIGENVALUES)
    expected = 0.01 * vectors @ torch.diag(values**2) @ vectors.T
    torch.testing.assert_close(noise.T.cov(), expected, atol=3e-5, rtol=0.03)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(3), atol=2e-3, rtol=0)


def test_jitter_does_not_clamp():
    bright = jittered(torch.ones(64, 3, 4, 4), 0.4, rng())
    assert bright.max() > 1.2


def test_shuffled_patches_are_strips_of_columns_then_of_rows():
    images = torch.arange(16.0).reshape(1, 1, 4, 4).expand(4000, 1, 4, 4)
    found = shuffled_patches(images, 2, rng())
    corner = found[:, 0, 0, 0]  # of the patch that came first
    assert set(corner.tolist()) == {0.0, 2.0, 8.0, 10.0}
    assert all(abs((corner == value).float().mean() - 0.25) < 0.03 for value in (0.0, 2.0, 8.0, 10.0))
    assert (found.flatten(1).sort(dim=1).values == torch.arange(16.0)).all()
    arrangements = {tuple(image[0, ::2, ::2].flatten().tolist()) for image in found}
    assert arrangements == {(0, 2, 8, 10), (2, 0, 10, 8), (8, 10, 0, 2), (10, 8, 2, 0)}
    first = found[0, 0]
    assert first[0, 1] == first[0, 0] + 1
    assert first[1, 0] == first[0, 0] + 4


def test_every_shift_is_a_translation_and_all_occur():
    images = torch.zeros(500, 1, 9, 9)
    images[:, :, 4, 4] = 1
    places = {divmod(int(image.flatten().argmax()), 9) for image in shifted(images, 2, rng())}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_half_of_the_images_are_mirrored():
    images = pictures(2000, channels=1, size=4)
    found = mirrored(images, rng())
    turned = (found == images.flip(3)).flatten(1).all(dim=1)
    assert (turned | (found == images).flatten(1).all(dim=1)).all()
    assert 0.46 < turned.float().mean() < 0.54


def test_cutmix_pastes_one_box_and_says_how_much_is_left():
    images = torch.arange(8.0).reshape(8, 1, 1, 1).expand(8, 3, 16, 16)
    for seed in range(20):
        mixed, order, share = cutmix(images, rng(seed))
        own = mixed == images
        pasted = mixed == images[order]
        assert (own | pasted).all()
        moved = order != torch.arange(8)
        assert own[moved].float().mean().item() == pytest.approx(share)
        boxes = own[moved].flatten(1)
        assert (boxes == boxes[0]).all()


def test_the_share_of_cutmix_is_distributed_as_published():
    shares = torch.tensor([cutmix(torch.zeros(2, 1, 32, 32), rng(seed))[2] for seed in range(3000)])
    draws = torch.rand(3, 30_000, generator=rng(1), dtype=torch.float64)
    side, centre = (1 - draws[0]).sqrt(), draws[1:]  # Yun et al.: sides √(1−λ), centre uniform, clipped at the borders
    edges = ((centre + side / 2).clamp(max=1) - (centre - side / 2).clamp(min=0)).prod(dim=0)
    assert shares.mean().item() == pytest.approx(1 - edges.mean().item(), abs=0.03)


def test_nothing_asked_for_is_nothing_done_and_all_of_it_gives_the_size():
    images = pictures(4, size=20)
    scale = Scale(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.25))
    assert augment(images, 20, rng(), cpu_rng=rng(), scale=scale) is images
    everything = AugmentConfig(
        rand_augment=(1, 6), shuffle_patches=3, crop=(0.5, 1), max_shift=2, flip=True, jitter=0.4, lighting=0.1,
        dsa=("color", "cutout"), dsa_every=True,
    )  # fmt: skip
    assert augment(images, 16, rng(), cpu_rng=rng(), scale=scale, **dict(everything)).shape == (4, 3, 16, 16)


def test_rand_augment_is_torchvisions_and_repeats_with_its_generator():
    from torchvision.transforms.v2 import RandAugment

    images = pictures(6)
    before = torch.random.get_rng_state()
    found = rand_augmented(images, 1, 6, rng(4))
    assert torch.equal(torch.random.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(2**62, (), generator=rng(4))))
        transform = RandAugment(num_ops=1, magnitude=6)
        expected = torch.stack([transform(image) for image in images])
    assert torch.equal(found, expected)
    assert not torch.equal(found, rand_augmented(images, 1, 6, rng(5)))


def test_dsa_acts_on_normalised_images():
    images, scale = torch.full((3, 1, 8, 8), 0.75), Scale(torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.25))
    cut = augment(images, 8, rng(), cpu_rng=rng(), scale=scale, dsa=("cutout",))
    assert set(cut.unique().tolist()) == {0.5, 0.75}, "what is cut out has the mean colour"


def test_of_a_list_of_families_one_is_drawn_for_each_batch():
    """IDC's evaluation: mirroring and colour always, then one of three (``DiffAug`` of its code with ``single_aug``)."""
    entries = AugmentConfig.model_validate({"dsa": ["flip", "color", ["crop", "scale", "rotate"]], "dsa_every": True}).dsa
    draws = rng()
    drawn = [tuple(drawn_families(entries, draws)) for _ in range(600)]
    assert {families[:2] for families in drawn} == {("flip", "color")}
    counts = Counter(families[2:] for families in drawn)
    assert set(counts) == {("crop",), ("scale",), ("rotate",)}
    assert min(counts.values()) > 160


@pytest.mark.parametrize("wrong", [{"dsa_every": True}, {"dsa": ["flip", ["crop", "scale"]]}])
def test_settings_of_dsa_without_effect_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValidationError, match="dsa_every=true"):
        AugmentConfig.model_validate(wrong)
