"""Items to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def collate_images(items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack items of `LabelledImages`: images to (batch, 3, height, width), labels and ids to (batch,)."""
    shapes = {tuple(item["images"].shape) for item in items}
    if len(shapes) > 1:
        raise ValueError(f"images of one batch differ in size: {sorted(shapes)}; the transform must crop them.")
    whole = {key: torch.tensor([item[key] for item in items]) for key in ("labels", "ids")}
    return {"images": torch.stack([item["images"] for item in items]), **whole}
