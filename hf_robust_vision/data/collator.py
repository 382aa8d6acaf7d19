"""Items to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def collate_images(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack items of `LabelledImages`.

    Returns:
        "images" of shape (batch, 3, height, width) in [0, 1], "labels" and "ids" of shape (batch,).

    Raises:
        ValueError: If the images differ in size.
    """
    shapes = {tuple(item["images"].shape) for item in items}
    if len(shapes) > 1:
        raise ValueError(f"images of one batch differ in size: {sorted(shapes)}; the transform must crop them.")
    return {
        "images": torch.stack([item["images"] for item in items]),
        "labels": torch.tensor([item["labels"] for item in items]),
        "ids": torch.tensor([item["ids"] for item in items]),
    }
