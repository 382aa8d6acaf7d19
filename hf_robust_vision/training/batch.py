"""What the two functions of a method get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hf_robust_vision.towers.base import EncoderOutput


@dataclass
class Batch:
    """A clean batch, and what the original model says of it.

    Args:
        images: Clean images in [0, 1], shape (batch, 3, height, width).
        labels: Shape (batch,).
        ids: Of the samples, shape (batch,).
        reference: Clean images and ids to the original's features.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    reference: Callable[[Tensor, Tensor], EncoderOutput]

    @cached_property
    def original(self) -> EncoderOutput:
        """Features of the original model on the clean images, without gradient; computed when first asked for."""
        return self.reference(self.images, self.ids)
