"""An exponential average of the weights: what is measured and saved, while training goes on from the latest ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from hf_robust_vision.towers.base import show_shards


PREFIX = "average."


class WeightAverage(TrainerCallback):
    """After update t, from 1, `average <- d * average + (1 - d) * weights` with `d = min(decay, (1 + t) / (10 + t))`.

    It begins at the weights that training begins at; the rising d lets a short run forget them. Of weights that train
    alone: the others are their own average. Every process keeps that of the weights, or shards, that it holds.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._weights: dict[str, nn.Parameter] = {}
        self._values: dict[str, Tensor] = {}  # none but while training

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin, where no checkpoint has told the average so far."""
        self._weights = _trained(model)
        if state.global_step == 0 or not self._values:
            self._values = {name: _wide(weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take in the weights of an update."""
        step = state.global_step
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self._weights.items():
            self._values[name].mul_(decay).add_(weight.detach().to(self._values[name].dtype), alpha=1 - decay)

    @contextmanager
    def put_in(self) -> Iterator[None]:
        """The model with the average in the place of its weights, which are back at the end."""
        kept = {name: self._weights[name].detach().clone() for name in self._values}
        self._copy_in(self._values)
        try:
            yield
        finally:
            self._copy_in(kept)

    def settle(self) -> None:
        """Leave the average in the model, for good."""
        self._copy_in(self._values)
        self._values = {}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint holds of it, whole tensors; every process must ask."""
        values = self._values or _trained(model)
        return {f"{PREFIX}{name}": _whole(value.detach()).contiguous() for name, value in values.items()}

    def take(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Go on with what `state` gave, of a model as it trains."""
        self._weights = _trained(model)
        self._values = {name: _shared_as(state[f"{PREFIX}{name}"], weight) for name, weight in self._weights.items()}

    @torch.no_grad()
    def _copy_in(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self._weights[name].copy_(value)


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    show_shards(model)
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _wide(weight: Tensor) -> Tensor:
    # In bfloat16 a thousandth of a difference would be rounded away.
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _shared_as(value: Tensor, weight: Tensor) -> Tensor:
    value = value.to(weight.device)
    return distribute_tensor(value, weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else value
