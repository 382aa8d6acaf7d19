"""Images in [0, 1] and the pixel values that a CLIP tower reads.

Everything here is differentiable torch, so that an attack can follow the gradient through resize, crop and
normalisation down to the raw image.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# Of a picture that tells nothing. Of 0.5, which no 8 bits give, SmolVLM's pixel values are all 0: it takes them for padding.
GREY = 128 / 255
_RESAMPLE = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # the codes of PIL.Image.Resampling


def check_images(images: Tensor, *, name: str = "images") -> Tensor:
    """Return `images` unchanged, or say why they are no floats in [0, 1] of shape (batch, 3, height, width).

    Raises:
        TypeError: If `images` is not a floating-point tensor.
        ValueError: If the shape is wrong, or a value is not finite or outside [0, 1], as those of a normalised tensor.
    """
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"{name} must be a float tensor in [0, 1], got {got}; divide uint8 images by 255.")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"{name} must have shape (batch, 3, height, width), got {tuple(images.shape)}.")
    if images.numel() == 0:
        return images
    # One pass, one wait for the device. Asked in this form, a NaN is refused as well: it makes both ends NaN.
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            f"{name} must lie in [0, 1], got values from {low:.4g} to {high:.4g}. Normalised pixel_values are not "
            "images: load the image with do_normalize=False (and do_rescale=True); the encoder normalises inside."
        )
    return images


def _channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # A compiler makes a constant of it by itself, and warns about caches.
    return (_make_channels if torch.compiler.is_compiling() else _cached_channels)(values, dtype, device)


def _make_channels(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device).view(1, -1, 1, 1)


_cached_channels = lru_cache(maxsize=64)(_make_channels)


class Fitting(Protocol):
    """What an image passes through before it is attacked: a `PixelTransform`, or what stands in for one."""

    def fit(self, images: Tensor) -> Tensor:
        """Images in [0, 1] of any size to the size at which they are attacked, still in [0, 1]."""


@dataclass(frozen=True)
class PixelTransform:
    """How a checkpoint's image processor turns an image into pixel values, in differentiable torch.

    Args:
        resize: Length of the shortest edge after the resize, in pixels, or (height, width).
        crop: Height and width of the centre crop, or None for no crop.
        mean: Of each channel, subtracted by normalisation.
        std: Of each channel, divided by.
        mode: Interpolation of `torch.nn.functional.interpolate`. Against PIL, bicubic differs by at most 1.2/255 a
            pixel, because PIL rounds to whole numbers, and by nothing where no resize is needed.
    """

    resize: int | tuple[int, int]
    crop: tuple[int, int] | None
    mean: tuple[float, ...] = OPENAI_MEAN
    std: tuple[float, ...] = OPENAI_STD
    mode: str = "bicubic"

    @property
    def resample(self) -> int:
        """PIL's code of `mode`."""
        return next(code for code, mode in _RESAMPLE.items() if mode == self.mode)

    @classmethod
    def from_image_processor(cls, processor: Any) -> PixelTransform:
        """Read the settings of a Hugging Face image processor.

        Raises:
            ValueError: If the processor resizes in a way that this class does not do.
        """
        size = dict(processor.size)
        if "shortest_edge" in size:
            resize: int | tuple[int, int] = int(size["shortest_edge"])
        elif "height" in size and "width" in size:
            resize = (int(size["height"]), int(size["width"]))
        else:
            raise ValueError(f"image processor size={size} is neither shortest_edge nor height and width.")
        resample = getattr(processor, "resample", None)
        resample = 3 if resample is None else int(resample)
        if resample not in _RESAMPLE:
            raise ValueError(f"image processor resample={resample} is not one of {sorted(_RESAMPLE)} (PIL codes).")
        crop_size = processor.crop_size if getattr(processor, "do_center_crop", False) else None
        crop = (int(crop_size["height"]), int(crop_size["width"])) if crop_size is not None else None
        if not getattr(processor, "do_normalize", True):
            return cls(resize, crop, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), _RESAMPLE[resample])
        return cls(resize, crop, tuple(processor.image_mean), tuple(processor.image_std), _RESAMPLE[resample])

    def fit(self, images: Tensor) -> Tensor:
        """Resize and centre-crop images in [0, 1] to what the tower takes; the same tensor if they already fit."""
        height, width = images.shape[-2:]
        if isinstance(self.resize, int):
            # Processors truncate the longer edge; a pixel more would shift the crop. Whole numbers, because the
            # product with a float scale falls short of 98 * 2 / 49 by one bit, and so by a pixel.
            longer = self.resize * max(height, width) // min(height, width)
            target = (self.resize, longer) if height <= width else (longer, self.resize)
        else:
            target = self.resize
        if target != (height, width):
            # Antialiased, as PIL's resize is; bicubic overshoots at edges, out of [0, 1].
            smooth = self.mode in ("bilinear", "bicubic")
            images = F.interpolate(
                images, target, mode=self.mode, antialias=smooth, align_corners=False if smooth else None
            ).clamp(0, 1)
        return images if self.crop is None else center_crop(images, self.crop)

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] to pixel values, same shape."""
        mean = _channels(self.mean, images.dtype, images.device)
        return (images - mean) / _channels(self.std, images.dtype, images.device)

    def denormalize(self, pixel_values: Tensor) -> Tensor:
        """Pixel values back to images, same shape."""
        std = _channels(self.std, pixel_values.dtype, pixel_values.device)
        return pixel_values * std + _channels(self.mean, pixel_values.dtype, pixel_values.device)


def center_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the centre of `size` (height, width) out of images, padding with zeros where the image is smaller."""
    height, width = images.shape[-2:]
    missing_height, missing_width = max(size[0] - height, 0), max(size[1] - width, 0)
    if missing_height or missing_width:
        top, left = (missing_height + 1) // 2, (missing_width + 1) // 2
        images = F.pad(images, (left, missing_width - left, top, missing_height - top))
        height, width = images.shape[-2:]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return images[..., top : top + size[0], left : left + size[1]]
