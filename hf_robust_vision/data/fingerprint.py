"""A hash of what a dataset holds, so that records on disk are used again for the same images only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


def fingerprint(rows: Any) -> str:
    """A `datasets.Dataset` has its own; of other rows the content counts, of files their path, size and time."""
    own = getattr(rows, "_fingerprint", None)
    if own is not None:
        return str(own)
    digest = hashlib.sha256()
    for index in range(len(rows)):
        for key, value in sorted(rows[index].items()):
            digest.update(f"{index}/{key}/".encode())
            digest.update(_content(value))
    return digest.hexdigest()[:16]


def _content(value: Any) -> bytes:
    if isinstance(value, Image.Image):
        return f"{value.mode}{value.size}".encode() + value.tobytes()
    if isinstance(value, Tensor | np.ndarray):
        array = np.ascontiguousarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        return f"{value.dtype}{tuple(value.shape)}".encode() + array.tobytes()
    if isinstance(value, bytes):
        return value
    if isinstance(value, Mapping):
        return b"".join(str(key).encode() + _content(part) for key, part in sorted(value.items()))
    if isinstance(value, str | Path) and len(str(value)) < 4096 and Path(value).is_file():
        state = Path(value).stat()
        return f"{value}/{state.st_size}/{state.st_mtime_ns}".encode()
    return repr(value).encode()
