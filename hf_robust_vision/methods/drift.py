"""How much clean images may drift: the weight of the anchor as a dual variable, so that a bound is given and no weight."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


class DualWeight:
    """The weight `w` of the clean images' distance to the original, by dual ascent on a bound of their drift.

    Drift is that distance over the distance of features that are all zero: `1 - cos` for cosines, and
    `||phi(x) - phi0(x)||^2 / ||phi0(x)||^2` for squared ones, sums over the images of an update in both. After each
    update `w <- max(0, w + step_size * (drift / bound - 1))`: it rises while the drift is over the bound, and falls to 0
    where the loss keeps below it by itself.

    Deviation: LORE bounds every image and learns a network of weights; this bounds the mean, by one number.

    Reference:
        LORE, https://huggingface.co/papers/2505.18884.
    """

    def __init__(self, bound: float, weight: float, step_size: float):
        self.bound, self.weight, self.step_size = bound, weight, step_size
        self._seen: list[Tensor] = []

    def observe(self, distances: Tensor, sizes: Tensor) -> None:
        """Remember some images of an update: their distances to the original, and those of zeros, shape (batch,) both."""
        self._seen.append(torch.stack([distances.detach().sum(), sizes.detach().sum()]))

    def update(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> float:
        """Take a step by all images since the last, and return their drift; `total` sums a tensor over the processes.

        Raises:
            ValueError: If the drift is not finite: a weight made of it would look like one.
        """
        # Of sums: the images of an update may lie on any number of processes, and come in any number of parts.
        distance, size = total(torch.stack(self._seen).sum(0))
        self._seen = []
        drift = float(distance / size)
        if not math.isfinite(drift):
            raise ValueError("the drift of clean images is not finite; type a smaller --learning_rate.")
        self.weight = max(0.0, self.weight + self.step_size * (drift / self.bound - 1))
        return drift
