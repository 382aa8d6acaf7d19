"""Zero-shot classification of corrupted images: the families of ImageNet-C at their five severities.

No attacker is at work here. The corruptions are those of the package `imagecorruptions`, which carries the code of the
benchmark: nothing of them is written anew.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_robust_vision import __version__
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.encoders import Encoder, attack_mode, image_embedder, tensor_sha256, weights_sha256
from hf_robust_vision.pixels import check_images
from hf_robust_vision.text_bank import TextBank

from .results import RobustnessResult, SampleRecord, summarize, versions, wilson_interval
from .samples import Records, SampleStore, measure_all
from .zero_shot import need_same_classes


FAMILIES = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA_FAMILIES = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # ImageNet-C keeps them for validation
SEVERITIES = (1, 2, 3, 4, 5)
LIBRARY = "imagecorruptions-imaug"
_SMALLEST = 32  # edge in pixels below which the library refuses an image


def corrupt(image: Tensor, family: str, severity: int, *, seed: int = 0, sample: int | str = 0) -> Tensor:
    """One image under one corruption, the same for the same seed and sample id.

    Args:
        image: In [0, 1], shape (3, height, width), at least 32 pixels a side; rounded to 8 bits, as the library takes
            it.
        family: One of `FAMILIES` or `EXTRA_FAMILIES`.
        severity: 1 to 5.
        seed: Of the run.
        sample: Id of the image.

    Returns:
        In [0, 1], the same shape, dtype and device.

    Raises:
        ModuleNotFoundError: If the library is not installed; the message is the line to type.
        ValueError: If the family or severity is unknown, or the image is too small.

    Reference:
        Hendrycks and Dietterich 2019, https://huggingface.co/papers/1903.12261.
    """
    functions = _library()
    check_families([family], [severity], functions)
    if min(image.shape[-2:]) < _SMALLEST:
        raise ValueError(f"the corruptions need at least {_SMALLEST} pixels a side, got {tuple(image.shape[-2:])}.")
    digest = hashlib.blake2b(f"{seed}/{sample}/{family}/{severity}".encode(), digest_size=4).digest()
    own_seed = int.from_bytes(digest, "little")
    # Imported here, for PIL alone: the encoders need no picture library.
    from PIL import Image

    picture = Image.fromarray((image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy())
    # Two families draw from a generator of their own, all others from numpy's global one.
    own = {"seed": own_seed} if "seed" in inspect.signature(functions[family]).parameters else {}
    with _numpy_seeded(own_seed):
        found = np.asarray(functions[family](picture, severity, **own))
    pixels = torch.from_numpy(np.uint8(found).astype(np.float32)).permute(2, 0, 1) / 255
    return pixels.to(image)
