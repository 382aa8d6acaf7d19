"""Faster training steps that change a result in its last digits only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """As `torch.set_float32_matmul_precision`, restored at the end; "highest" leaves what is set."""
    before = torch.get_float32_matmul_precision()
    if precision != "highest":
        torch.set_float32_matmul_precision(precision)
    # Restored after each step: an evaluation in between would report numbers of a precision that nobody asked it for.
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compile_in_place(encoder: nn.Module, accelerator: Accelerator) -> None:
    """Compile the encoder as the accelerator was asked to compile the model, and keep the accelerator from it."""
    # It would wrap the model as launched, and on unwrapping it put the bare encoder into that wrapper: an attack through
    # the unwrapped encoder then runs the whole of DDP. Compiled in place, the encoder keeps its class and its names, and
    # attack and learner call the same compiled function.
    plugin = accelerator.state.dynamo_plugin
    if plugin.backend != DynamoBackend.NO:
        encoder.compile(**plugin.to_kwargs())
        plugin.backend = DynamoBackend.NO
