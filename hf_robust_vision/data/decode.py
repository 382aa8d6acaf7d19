"""The one place where image files become tensors."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor


MAX_PIXELS = 50_000_000
MAX_PIXELS_VARIABLE = "HF_ROBUST_VISION_MAX_PIXELS"
MAX_ASPECT = 100  # the shorter edge is resized to the tower's; the longer one would grow by as much
# Others run programs (EPS), or hold no picture of a set size.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
# By EXIF orientation. Not `ImageOps.exif_transpose`, which writes the other tags anew and fails at odd ones.
_T = Image.Transpose
_UPRIGHT = {
    2: _T.FLIP_LEFT_RIGHT, 3: _T.ROTATE_180, 4: _T.FLIP_TOP_BOTTOM, 5: _T.TRANSPOSE, 6: _T.ROTATE_270, 7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}  # fmt: skip
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # TIFF tags


class CorruptImageError(ValueError):
    """An image that can not be used; the message names it."""


def decode_image(value: Any, name: str = "image") -> Tensor:
    """Decode a path, bytes, PIL image, or `datasets` image entry to a tensor in [0, 1], shape (3, height, width).

    It stands upright (EXIF), its palette is looked up, and its alpha channel is dropped, as `transformers`' own
    `load_image` does. Of several frames it is the first. Grey values of 12, 16 or 32 bits are divided by the greatest
    value of their type; floats must lie in [0, 1] already.

    Raises:
        CorruptImageError: If the image, which the message calls `name`, can not be read to its end, has values outside
            its range or nearly all of it unused, more pixels than `HF_ROBUST_VISION_MAX_PIXELS` (50 million, and never
            more than PIL allows), or one edge over 100 times the other.
    """
    limit = _max_pixels()
    try:
        if isinstance(value, Image.Image):
            return _to_tensor(value, limit)
        with Image.open(_source(value), formats=_formats()) as picture:
            return _to_tensor(picture, limit)
    except Exception as error:  # on a hostile file PIL raises anything, from IndexError to struct.error
        reason = error if isinstance(error, CorruptImageError) else f"is corrupt or truncated ({error!r})"
        raise CorruptImageError(f"{name} {reason}; pass --skip_corrupt to go on without it.") from error


def picture_size(path: str | Path) -> tuple[int, int]:
    """Width and height by the head of a file, before its pixels are read; a `CorruptImageError` where there is none."""
    try:
        with Image.open(path, formats=_formats()) as picture:
            return picture.size
    except Exception as error:  # on a hostile file PIL raises anything
        raise CorruptImageError(f"{path} is damaged, or no picture.") from error


def undecoded(rows: Any, column: str) -> Any:
    """Rows of `datasets` that give the file of an image and leave it to `decode_image`; any others as they are."""
    import datasets

    if column not in (getattr(rows, "features", None) or {}):
        return rows
    return rows.cast_column(column, datasets.Image(decode=False))


def _source(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = value.get("path") if value.get("bytes") is None else value["bytes"]
    if isinstance(value, bytes):
        return io.BytesIO(value)
    if not isinstance(value, str | Path):
        raise CorruptImageError(f"is no image but {type(value).__name__}")
    return value


def _to_tensor(picture: Image.Image, limit: int) -> Tensor:
    width, height = picture.size
    if width * height > limit:
        raise CorruptImageError(f"has {width} x {height} pixels, over {limit:,} (set {MAX_PIXELS_VARIABLE})")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise CorruptImageError(f"has {width} x {height} pixels: one edge is over {MAX_ASPECT} times the other")
    tags = dict(getattr(picture, "tag_v2", {}))
    picture.load()
    if (turn := _UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))) is not None:
        picture = picture.transpose(turn)
    if picture.mode.startswith(("I", "F")):  # `convert` would cut their values off at 255
        return _grey(picture, tags).expand(3, -1, -1).contiguous()
    if picture.mode in ("P", "PA"):  # else PIL warns of a transparent colour
        picture = picture.convert("RGBA")
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous().float().div_(255)


def _grey(picture: Image.Image, tags: Mapping[int, Any]) -> Tensor:
    """Values of more than 8 bits over the greatest of their type, shape (height, width)."""
    values = np.asarray(picture)
    bits, signed = tags.get(_BITS, (16,))[0], tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    top = 1 if picture.mode == "F" else 2 ** (bits - signed) - 1
    if bits == 32 and values.dtype == np.int32 and not signed:
        values = values.view(np.uint32)
    low, high = values.min().item(), values.max().item()
    if not 0 <= low <= high <= top:
        raise CorruptImageError(f"holds values from {low:g} to {high:g}, wanted 0 to {top}")
    if 0 < high < top / 255:
        raise CorruptImageError(f"is all but black: its values reach {high:g} of {top}; scale them to that range")
    if tags.get(_PHOTOMETRIC) == 0:  # white is 0
        values = top - values
    return torch.from_numpy((values / np.float64(top)).astype(np.float32))


def _max_pixels() -> int:
    text = os.environ.get(MAX_PIXELS_VARIABLE, str(MAX_PIXELS))
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{MAX_PIXELS_VARIABLE} must be a whole number of pixels, got {text!r}.")
    return int(text)


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
