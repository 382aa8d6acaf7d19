"""Corrupted images: the families of ImageNet-C, from `imagecorruptions-imaug`, a kept copy of the benchmark's own code."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor


FAMILIES = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA_FAMILIES = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # the benchmark keeps them for validation
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # edge in pixels below which the library refuses an image
LIBRARY = "imagecorruptions-imaug"


def corrupt(image: Tensor, family: str, severity: int, *, seed: int = 0, sample: int | str = 0) -> Tensor:
    """One corrupted image, always the same one for the same seed and sample id.

    The image is in [0, 1], shape (3, height, width), at least 32 pixels a side (else a ValueError). The library takes it
    rounded to 8 bits; the result has its dtype and device.

    Reference:
        Hendrycks and Dietterich 2019, https://huggingface.co/papers/1903.12261.
    """
    check_choice([family], [severity])
    if min(image.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"corruptions need images of at least {SMALLEST} pixels a side, got {tuple(image.shape[-2:])}."
        )
    # A hash, because `hash` of a text differs from process to process, and sums of seed and id would meet.
    digest = hashlib.blake2b(f"{seed}/{sample}/{family}/{severity}".encode(), digest_size=4).digest()
    draw = int.from_bytes(digest, "little")
    pixels = (image.detach() * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    # Two families draw from a generator of their own, the others from numpy's global one.
    own = {"seed": draw} if "seed" in inspect.signature(library().corruption_dict[family]).parameters else {}
    with _numpy_seeded(draw):
        found = library().corrupt(np.ascontiguousarray(pixels), severity=severity, corruption_name=family, **own)
    return (torch.from_numpy(np.array(found)).permute(2, 0, 1).float() / 255).to(image)


def library() -> Any:
    """The package of the corruptions, or a `ModuleNotFoundError` with the line to type."""
    try:
        version(LIBRARY)  # the unkept package of the same import name does not run beside a current numpy
        import imagecorruptions
    except (PackageNotFoundError, ModuleNotFoundError) as error:
        raise ModuleNotFoundError(
            f'corruptions need the package {LIBRARY}: pip install "hf-robust-vision[corruptions]"'
        ) from error
    return imagecorruptions


def check_choice(families: Sequence[str], severities: Sequence[int]) -> None:
    """Refuse families and severities that are unknown, and none at all."""
    known = [name for name in (*FAMILIES, *EXTRA_FAMILIES) if name in library().corruption_dict]
    if not families or any(name not in known for name in families):
        raise ValueError(f"unknown corruption in {list(families)}; choose out of {', '.join(known)}.")
    if not severities or any(severity not in SEVERITIES for severity in severities):
        raise ValueError(f"severities must be whole numbers from 1 to 5, got {list(severities)}.")


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    # Put back, because the run's own draws must not hang on what is measured.
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
