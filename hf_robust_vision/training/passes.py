"""What an update costs, in passes of one image through the network: the same number on every machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


IMAGE_ENTRIES = ("image_embeds", "patch_tokens", "language_tokens", "deepstack_tokens")


class PassCounter:
    """Counts passes: 1 for a forward pass of one image, 1 for the gradient at its input, 1 for that of the weights.

    A learner's backward pass makes both of the latter; an attack's makes the first. A pass over a share of the tokens
    counts as that share. Passes over text are not counted.
    """

    def __init__(self) -> None:
        self.total, self.share, self._paused = 0.0, 1.0, False

    def start(self) -> None:
        """Forget what was counted."""
        self.total = 0.0

    def add(self, images: float) -> None:
        """Count one pass of so many images."""
        if not self._paused:
            self.total += self.share * images

    @contextmanager
    def at(self, share: float) -> Iterator[None]:
        """Passes inside read this share of the tokens."""
        before, self.share = self.share, share
        try:
            yield
        finally:
            self.share = before

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Passes inside are not part of the update, such as those of what is logged."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def watch(self, model: Any) -> Any:
        """A model that counts its passes here, and is otherwise the one given."""
        return _Watched(model, self)


class _Watched:
    # Around the model, not a hook on it: a hook would be compiled with it, and compiled anew at each new count.

    def __init__(self, model: Any, counter: PassCounter):
        self._model, self._counter = model, counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, images: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        output = self._model(images, *args, **kwargs)
        if images is None or torch.compiler.is_compiling():  # a graph counts nothing; who runs it does
            return output
        rows, counter, share = len(images), self._counter, self._counter.share
        counter.add(rows)
        entries = [output.get(entry) for entry in IMAGE_ENTRIES]
        with_gradient = [entry for entry in entries if entry is not None and entry.requires_grad]
        learns = bool(with_gradient) and any(parameter.requires_grad for parameter in self._model.parameters())

        def backward(_: Tensor) -> None:
            with counter.at(share):
                counter.add(rows * (2 if learns else 1))

        if with_gradient:
            # Once a backward pass, whichever of them the loss looks at.
            torch.autograd.graph.register_multi_grad_hook(with_gradient, backward, mode="any")
        return output
