"""Differentiable pixels against the processor that CLIP ships with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil as CLIPImageProcessor
from transformers.image_transforms import get_resize_output_image_size

from hf_robust_vision.pixels import PixelTransform, center_crop, check_images


def pil_processor(size=32, **settings):
    crop = {"height": size, "width": size}
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=crop, **settings)


def random_image(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def as_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize(
    ("height", "width"), [(48, 48), (64, 40), (40, 64), (33, 47), (96, 128), (24, 24), (49, 98), (37, 111)]
)
def test_resize_is_close_to_pil(height, width):
    picture = random_image(height, width)
    processor = pil_processor(do_normalize=False, do_rescale=True)
    wanted = torch.as_tensor(np.array(processor(picture)["pixel_values"][0]))[None]
    got = PixelTransform.from_image_processor(processor).fit(as_tensor(picture))
    assert got.shape == wanted.shape == (1, 3, 32, 32)
    assert (got - wanted).abs().max() <= 1.2 / 255 + 1e-6


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 50), (47, 32)])
def test_no_gap_where_nothing_is_resized(height, width):
    picture = random_image(height, width)
    processor = pil_processor()
    transform = PixelTransform.from_image_processor(processor)
    wanted = torch.as_tensor(np.array(processor(picture)["pixel_values"][0]))[None]
    torch.testing.assert_close(transform.normalize(transform.fit(as_tensor(picture))), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("edge", [32, 224, 336])
def test_longer_edge_is_the_processors(edge):
    """One pixel more or less shifts the crop; a truncated float is where that happens."""
    transform = PixelTransform(edge, None)
    for height, width in [(49, 98), (98, 49), (61, 122), (107, 321), (375, 500), (500, 333), (41, 123)]:
        array = np.zeros((height, width, 3), dtype=np.uint8)
        wanted = get_resize_output_image_size(array, edge, default_to_square=False)
        assert transform.fit(torch.zeros(1, 3, height, width)).shape[-2:] == tuple(wanted), (height, width)


def test_height_and_width_size():
    processor = CLIPImageProcessor(size={"height": 16, "width": 24}, do_center_crop=False)
    transform = PixelTransform.from_image_processor(processor)
    assert transform.resize == (16, 24)
    assert transform.fit(torch.rand(2, 3, 40, 40)).shape == (2, 3, 16, 24)


@pytest.mark.parametrize(("resample", "mode"), [(0, "nearest-exact"), (2, "bilinear"), (3, "bicubic")])
def test_resample_codes(resample, mode):
    assert PixelTransform.from_image_processor(pil_processor(resample=resample)).mode == mode


def test_unknown_resample_is_refused():
    with pytest.raises(ValueError, match="resample=1"):
        PixelTransform.from_image_processor(pil_processor(resample=1))


def test_no_normalisation():
    transform = PixelTransform.from_image_processor(pil_processor(do_normalize=False))
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(transform.normalize(images), images)


def test_normalise_and_back():
    transform = PixelTransform(32, (32, 32), (0.1, 0.2, 0.3), (0.5, 0.25, 2.0))
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    pixel_values = transform.normalize(images)
    torch.testing.assert_close(pixel_values[:, 1], (images[:, 1] - 0.2) / 0.25)
    torch.testing.assert_close(transform.denormalize(pixel_values), images)


def test_gradients_reach_the_raw_image():
    images = torch.rand(1, 3, 48, 60).requires_grad_(True)
    transform = PixelTransform(32, (32, 32))
    transform.normalize(transform.fit(images)).square().sum().backward()
    touched = images.grad.abs().sum(1)[0]
    assert touched[:, 20:40].min() > 0
    assert touched.isfinite().all()


def test_fitting_image_is_not_copied():
    images = torch.rand(1, 3, 32, 32)
    assert PixelTransform(32, None).fit(images) is images
    assert torch.equal(PixelTransform(32, (32, 32)).fit(images), images)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (21, 40), (40, 21)])
def test_crop_of_a_small_image_pads_like_the_processor(height, width):
    picture = random_image(height, width)
    processor = pil_processor(do_resize=False, do_normalize=False)
    wanted = torch.as_tensor(np.array(processor(picture)["pixel_values"][0]))[None]
    torch.testing.assert_close(center_crop(as_tensor(picture), (32, 32)), wanted, rtol=0, atol=1e-6)


GOOD = torch.rand(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("images", "error", "said"),
    [
        (PixelTransform(4, None).normalize(GOOD), ValueError, r"from -\d.*do_normalize=False"),
        (GOOD * 255, ValueError, r"to 2\d\d"),
        ((GOOD * 255).to(torch.uint8), TypeError, "uint8.*divide"),
        (torch.full((1, 3, 2, 2), float("nan")), ValueError, "nan"),
        (torch.full((1, 3, 2, 2), float("inf")), ValueError, "inf"),
        (GOOD[0], ValueError, r"\(3, 4, 4\)"),
        (GOOD[:, :1], ValueError, r"\(2, 1, 4, 4\)"),
        ([[0.5]], TypeError, "list"),
    ],
    ids=["normalised", "0-255", "uint8", "nan", "inf", "no-batch", "gray", "list"],
)
def test_what_is_no_image_is_named(images, error, said):
    with pytest.raises(error, match=said):
        check_images(images)


def test_images_pass_unchanged():
    assert check_images(GOOD) is GOOD
    assert check_images(GOOD[:0]).shape == (0, 3, 4, 4)
