"""What a visitor may hand in; everything else ends in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_robust_vision.data.decode import CorruptImageError, decode_image, picture_size


EPS = (1, 32)  # in 255ths of the pixel range
STEPS = (5, 100)


@dataclass(frozen=True)
class Limits:
    """Of one attack, and of those who wait for theirs."""

    megapixels: float = 16
    megabytes: float = 10
    characters: int = 1000
    classes: int = 100
    seconds: float = 180  # of one attack on both models
    waiting: int = 8  # attacks in the queue


LIMITS = Limits()


def check_picture(path: str | Path | None, limits: Limits) -> Path:
    """The file of an uploaded picture, once it has been read to its end.

    Raises:
        ValueError: If there is none, it is too large, or no picture.
    """
    if path is None:
        raise ValueError("there is no image: upload one, or choose an example.")
    file = Path(path)
    if file.stat().st_size > limits.megabytes * 1e6:
        raise ValueError(f"the image file is over {limits.megabytes:g} MB: upload a smaller one.")
    try:
        width, height = picture_size(file)
    except CorruptImageError as error:
        raise ValueError("the file is damaged, or no picture: upload a PNG, JPEG or WebP.") from error
    if width * height > limits.megapixels * 1e6:
        raise ValueError(
            f"the image has {width} x {height} pixels, over {limits.megapixels:g} megapixels: upload a smaller one."
        )
    try:
        decode_image(file)
    except CorruptImageError as error:
        told = error.__cause__ if isinstance(error.__cause__, CorruptImageError) else "is damaged, or no picture"
        raise ValueError(f"the image {told}: upload another one.") from error
    return file


def check_text(text: str, limits: Limits) -> str:
    """A question or class names, without spaces around.

    Raises:
        ValueError: If it is empty or too long.
    """
    if not (text := (text or "").strip()):
        raise ValueError("there is no text: type a question for a VLM, or class names for a CLIP.")
    if len(text) > limits.characters:
        raise ValueError(f"the text has {len(text):,} characters, over {limits.characters:,}: shorten it.")
    return text


def class_names(text: str, limits: Limits) -> Sequence[str]:
    """Class names that commas or line ends part.

    Raises:
        ValueError: If they are fewer than two, too many, or one stands twice.
    """
    names = [name.strip() for name in text.replace("\n", ",").split(",") if name.strip()]
    if len(names) < 2:
        raise ValueError(f"a CLIP chooses among classes: name at least two, parted by commas; got {names}.")
    if len(names) > limits.classes:
        raise ValueError(f"these are {len(names)} classes, over {limits.classes}: name fewer.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice[:3])}: named twice, and no text tells two such classes apart.")
    return names


def check_number(name: str, value: float, low: float, high: float) -> float:
    """A number of a slider, which a visitor may also send by hand.

    Raises:
        ValueError: If it lies outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}.")
    return value
