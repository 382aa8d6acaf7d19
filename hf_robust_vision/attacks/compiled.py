"""A step of PGD compiled as one region: the forward pass, its gradient at the images, the ascent and the projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .balls import Ball
from .objectives import Objective
from .search import Run, mended


class CompiledStep:
    """What `pgd_last` takes as its `step`: the same step through `torch.compile`, in one graph.

    An objective that looks elsewhere at each call offers `now()`, what it is at this call; that is chosen outside of the
    graph, which then serves all steps. It has to be traceable: its own forward pass, without hooks of autograd, waits for
    the device or prints.

    Args:
        backend: Of `torch.compile`; "inductor" writes kernels, "eager" and "aot_eager" run the graph as it is.

    Raises:
        torch._dynamo.exc.TorchDynamoException: At a step, if the objective can not be one graph.
    """

    def __init__(self, backend: str = "inductor"):
        self._step: Callable[..., tuple[Tensor, Tensor]] = torch.compile(_step, backend=backend, fullgraph=True)

    def __call__(self, run: Run, adversarial: Tensor, size: float) -> Tensor:
        """The iterate after this one."""
        now = getattr(run.objective, "now", None)
        objective = run.objective if now is None else now()
        adversarial, bad = self._step(objective, adversarial, run.images, run.ball, size)
        run.search.note(bad, len(adversarial))
        return adversarial


def _step(objective: Objective, adversarial: Tensor, images: Tensor, ball: Ball, size: float) -> tuple[Tensor, Tensor]:
    # By `torch.func`: `torch.autograd.grad` breaks the graph.
    gradient, bad = mended(torch.func.grad(lambda at: objective(at).sum())(adversarial))
    return ball.project(adversarial + size * ball.ascend(gradient), images), bad
