"""Noticing that all images drift to one embedding, which a Siamese loss rewards."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


# Share of the original's spread (one minus mean pairwise cosine) below which embeddings count as collapsed. On the
# demo `frozen` and `anchored` kept all of it; `paper` fell to 0.06 within 30 updates.
COLLAPSED_SHARE = 0.1


class CollapseError(RuntimeError):
    """The embeddings of different images have become one point."""


def mean_pairwise_cosine(embeds: Tensor, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> Tensor:
    """Mean cosine over all pairs of different rows; 0 for a single row. `total` sums a tensor over the processes."""
    # |sum of unit rows|^2 holds every pair twice and each row with itself once: a sum of one vector over the processes
    # is enough, and no embedding need be gathered.
    unit = F.normalize(embeds.float(), dim=-1)
    sums = total(torch.cat([unit.sum(0), unit.new_tensor([len(unit)])]))
    count = sums[-1]
    return (sums[:-1].square().sum() - count) / (count * (count - 1)).clamp(min=1)


def check_collapse(pairwise: float, original: float, on_collapse: str, step: int, hint: str) -> None:
    """Stop a run whose embeddings have lost nearly all of the original's spread, or, at "record", only warn.

    `pairwise` and `original` are the mean pairwise cosines of tuned and original encoder on the same images; `hint` says
    what to type. What is not finite is a ValueError.
    """
    # Against the original on the same images: a CLIP's embeddings share a direction to begin with, some sets more of it.
    if not math.isfinite(pairwise):
        raise ValueError(f"the embeddings of step {step} are not finite; {hint}")
    # A batch of near-identical images has no spread to lose.
    if original > 0.999 or (1 - pairwise) >= COLLAPSED_SHARE * (1 - original):
        return
    message = (
        f"the embeddings collapsed at step {step}: mean pairwise cosine {pairwise:.3f}, the original's "
        f"{original:.3f}. Every image now looks alike, however good the loss looks; {hint}"
    )
    if on_collapse == "stop":
        raise CollapseError(message)
    warnings.warn(message, stacklevel=2)
