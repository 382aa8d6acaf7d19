"""Noticing that all images drift to one embedding, which a Siamese loss rewards."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


# Share of the original's spread (one minus mean pairwise cosine) below which embeddings count as collapsed. On the
# demo `frozen` and `anchored` kept all of it; `paper` fell to 0.06 within 30 updates.
COLLAPSED_SHARE = 0.1


class CollapseError(RuntimeError):
    """The embeddings of different images have become one point."""


@dataclass(frozen=True)
class Spread:
    """Mean cosine between different images of a batch, for the tuned and the original encoder."""

    pairwise: Tensor
    original: Tensor

    @classmethod
    def of(cls, embeds: Tensor, original: Tensor) -> Spread:
        """From two sets of embeddings of the same images, shape (batch, dim)."""
        return cls(mean_pairwise_cosine(embeds), mean_pairwise_cosine(original))


def mean_pairwise_cosine(embeds: Tensor) -> Tensor:
    """Mean cosine over all pairs of different rows; 0 for a single row."""
    unit = F.normalize(embeds.float(), dim=-1)
    count = len(unit)
    return (unit.sum(0).square().sum() - count) / max(count * (count - 1), 1)


def check_collapse(pairwise: float, original: float, on_collapse: str, step: int, last_good: str | None) -> None:
    """Stop a run whose embeddings have lost nearly all of the original's spread, or only warn.

    Args:
        pairwise: Mean pairwise cosine of the tuned encoder.
        original: The same of the original on the same images.
        on_collapse: "stop" or "record".
        step: Global step, for the message.
        last_good: Last complete checkpoint.

    Raises:
        CollapseError: If they have, and `on_collapse` is "stop".
    """
    # A batch of near-identical images has no spread to lose.
    if original > 0.999 or (1 - pairwise) >= COLLAPSED_SHARE * (1 - original):
        return
    message = (
        f"the embeddings collapsed at step {step}: mean pairwise cosine {pairwise:.3f}, the original's "
        f"{original:.3f}. Every image now looks alike, however good the loss looks. Use form='anchored' or "
        f"form='frozen', a larger anchor_weight, or a smaller learning_rate. Last good checkpoint: {last_good}."
    )
    if on_collapse == "stop":
        raise CollapseError(message)
    warnings.warn(message, stacklevel=2)
