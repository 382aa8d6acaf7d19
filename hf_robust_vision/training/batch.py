"""What the two functions of a method get."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from hf_robust_vision.towers.base import EncoderOutput


@dataclass
class Batch:
    """A clean batch, images in [0, 1], and what the `reference` says of it, which takes images and ids."""

    images: Tensor
    labels: Tensor
    ids: Tensor
    reference: Callable[[Tensor, Tensor], EncoderOutput]

    @cached_property
    def original(self) -> EncoderOutput:
        """Features of the original model on the clean images, without gradient."""
        # When first asked for, which TeCoA never does; then once, for attack, loss and monitor.
        return self.reference(self.images, self.ids)
