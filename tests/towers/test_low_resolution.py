"""Attack steps on a smaller view: the tower on an image that was made smaller, and the gradient of that."""

from __future__ import annotations

import pytest
import torch

from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.low_resolution import LowResolution


@pytest.fixture(params=["clip", "siglip"])
def tower(request, clip_folder, siglip_folder):
    return load_encoder({"clip": clip_folder, "siglip": siglip_folder}[request.param], dtype=torch.float64).eval()


def halving():
    """The antialiased resize from 32 pixels to 16 as a matrix: a triangle over four pixels, cut off at the edges."""
    small, large = torch.arange(16, dtype=torch.float64) + 0.5, torch.arange(32, dtype=torch.float64) + 0.5
    weights = (1 - (large - 2 * small[:, None]).abs() / 2).clamp_min(0)
    return weights / weights.sum(1, keepdim=True)


def pooled(tower, pixel_values):
    return tower.project(tower.vision_model(pixel_values, interpolate_pos_encoding=True).pooler_output)


def test_it_is_the_tower_on_a_smaller_image(tower):
    images, resize = torch.rand(2, 3, 32, 32, dtype=torch.float64), halving()
    view, whole = LowResolution(tower, 16), tower(images).image_embeds
    with view.seen():
        small = tower(images).image_embeds
    by_hand = pooled(tower, tower.transform.normalize(resize @ images @ resize.T))
    assert torch.allclose(small, by_hand, rtol=0, atol=1e-12)
    assert not torch.allclose(small, whole, atol=1e-3)
    assert torch.equal(tower(images).image_embeds, whole), "asleep again"
    first = tower.class_tokens
    assert view.cost == (first + 4) / (first + 16)


def test_the_gradient_is_that_of_the_resize(tower):
    """In closed form R^T g R, with g the gradient at the smaller image, and by central differences."""
    images, resize = torch.rand(2, 3, 32, 32, dtype=torch.float64), halving()
    weight = torch.randn(2, whole_width(tower), dtype=torch.float64)
    objective = LowResolution(tower, 16).of(lambda at: (tower(at).image_embeds * weight).sum(1))
    leaf = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(objective(leaf).sum(), leaf)
    small = (resize @ images @ resize.T).requires_grad_(True)
    (at_small,) = torch.autograd.grad((pooled(tower, tower.transform.normalize(small)) * weight).sum(), small)
    wanted = resize.T @ at_small @ resize
    assert (gradient - wanted).abs().max() < 1e-12 * wanted.abs().max().clamp_min(1)
    assert (gradient != 0).all(), "every pixel of the whole image is reached"
    way, step = torch.randn_like(images), 1e-6
    with torch.no_grad():
        slope = (objective(images + step * way) - objective(images - step * way)) / (2 * step)
    assert torch.allclose((gradient * way).flatten(1).sum(1), slope, rtol=1e-6)


def whole_width(tower):
    return tower(torch.zeros(1, 3, 32, 32, dtype=torch.float64)).image_embeds.shape[1]


@pytest.mark.parametrize("side", [32, 40, 12, 4])
def test_no_smaller_view_of_whole_patches(tower, side):
    with pytest.raises(ValueError, match=rf"attack_resolution={side} is no smaller view.*--attack_resolution 16"):
        LowResolution(tower, side)


def test_another_tower_is_refused():
    with pytest.raises(ValueError, match="CLIP or a SigLIP, which interpolates its positions, got Linear; leave it"):
        LowResolution(torch.nn.Linear(1, 1), 16)
