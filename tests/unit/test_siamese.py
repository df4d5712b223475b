"""DSA's augmentations, against computations by hand and torchvision."""

from __future__ import annotations

import pytest
import torch

from ims3_ray.data.siamese import Family, drawn_families, siamese

FAMILIES: tuple[Family, ...] = ("color", "crop", "cutout", "flip", "scale", "rotate")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, size: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=rng(7), dtype=torch.float64)


@pytest.mark.parametrize("family", FAMILIES)
def test_real_and_synthetic_images_share_one_draw(family: Family):
    images = pictures(6)
    whole = siamese(images, [family], rng(1), alike=True)
    parts = [siamese(part, [family], rng(1), alike=True) for part in (images[:4], images[4:])]
    assert torch.equal(whole, torch.cat(parts))
    same = pictures(1).expand(6, -1, -1, -1)
    assert len({image.numpy().tobytes() for image in siamese(same, [family], rng(1), alike=True)}) == 1
    assert len({image.numpy().tobytes() for image in siamese(same, [family], rng(1))}) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_augmentation_has_a_gradient(family: Family):
    images = pictures(2).requires_grad_()
    siamese(images, [family], rng(2), alike=True).square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_color_is_brightness_then_saturation_then_contrast():
    images, draws = pictures(5), rng(3)
    brightness, saturation, contrast = (torch.rand(5, generator=draws).double() for _ in range(3))
    for b, found in enumerate(siamese(images, ["color"], rng(3))):
        image = images[b] + brightness[b] - 0.5
        grey = image.mean(dim=0)
        image = grey + 2 * saturation[b] * (image - grey)
        expected = image.mean() + (0.5 + contrast[b]) * (image - image.mean())
        torch.testing.assert_close(found, expected)


def test_every_crop_is_a_shift_of_at_most_an_eighth():
    dot = torch.zeros(2000, 1, 16, 16)
    dot[:, :, 8, 8] = 1
    found = siamese(dot, ["crop"], rng(4))
    places = {divmod(int(image.argmax()), 16) for image in found.flatten(1)}
    assert places == {(y, x) for y in range(6, 11) for x in range(6, 11)}
    assert (siamese(torch.ones(50, 1, 16, 16), ["crop"], rng()).flatten(1).min(dim=1).values == 0).any(), "zeros move in"


def test_cutout_covers_a_square_of_half_the_side_that_may_leave_the_image():
    found = siamese(torch.ones(3000, 1, 8, 8), ["cutout"], rng(5))
    holes = (found == 0).sum(dim=(1, 2, 3))
    heights = (found == 0).any(dim=3).sum(dim=(1, 2))
    assert holes.max() == 16
    assert set(heights.tolist()) == {2, 3, 4}, "centred from the first to behind the last row"
    # The centre is uniform in 0 … 8; 2 of these 9 places leave 2 rows, 2 leave 3 and 5 leave 4.
    assert (heights == 4).double().mean() == pytest.approx(5 / 9, abs=0.03)


def test_half_are_mirrored():
    images = pictures(2000, 4)
    found = siamese(images, ["flip"], rng(6))
    turned = (found == images.flip(3)).flatten(1).all(dim=1)
    assert (turned | (found == images).flatten(1).all(dim=1)).all()
    assert turned.double().mean() == pytest.approx(0.5, abs=0.04)


def test_rotation_is_torchvisions():
    from torchvision.transforms.v2 import functional as tv

    images, draws = pictures(4), rng(8)
    angles = (2 * torch.rand(4, generator=draws).double() - 1) * 15
    for b, found in enumerate(siamese(images, ["rotate"], rng(8))):
        expected = tv.rotate(images[b], angles[b].item(), tv.InterpolationMode.BILINEAR)
        inner = (slice(None), slice(4, 12), slice(4, 12))  # torchvision fades the edges otherwise
        torch.testing.assert_close(found[inner], expected[inner], atol=1e-5, rtol=1e-5)


def test_scaling_is_independent_in_both_directions_and_within_its_range():
    ramp = torch.linspace(-1, 1, 17, dtype=torch.float64)
    image = torch.stack([ramp[None, :].expand(17, 17), ramp[:, None].expand(17, 17)])[None].expand(500, -1, -1, -1)
    found = siamese(image, ["scale"], rng(9))
    x = (found[:, 0, 8, 9] - found[:, 0, 8, 8]) / (ramp[1] - ramp[0])
    y = (found[:, 1, 9, 8] - found[:, 1, 8, 8]) / (ramp[1] - ramp[0])
    for factor in (x, y):
        assert factor.min() >= 1 / 1.2 - 1e-6
        assert factor.max() <= 1.2 + 1e-6
        assert factor.mean() == pytest.approx((1 / 1.2 + 1.2) / 2, abs=0.02)
    assert torch.stack([x, y]).corrcoef()[0, 1].abs() < 0.15


def test_each_family_is_drawn_equally_often():
    draws = rng(10)
    drawn = [drawn_families([FAMILIES], draws)[0] for _ in range(3000)]
    assert all(abs(drawn.count(family) / 3000 - 1 / 6) < 0.03 for family in FAMILIES)
