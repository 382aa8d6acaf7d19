"""Projected gradient descent, and the fast gradient sign method as its one-step form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .balls import Ball, check_length
from .noise import StartNoise
from .objectives import Objective, Success
from .search import Run, Search, check_count


Step = Callable[[Run, Tensor, float], Tensor]  # of a run, from an iterate and by a length, to the next iterate


def pgd(
    objective: Objective,
    images: Tensor,
    ball: Ball,
    *,
    steps: int,
    step_size: float | None = None,
    noise: StartNoise | None = None,
    restarts: int = 1,
    fooled: Success | None = None,
) -> Tensor:
    """Raise an objective inside a ball by projected gradient steps; the iterate of the highest loss counts.

    Args:
        objective: Images in [0, 1] to one loss per image.
        images: Clean images in [0, 1], shape (batch, 3, height, width).
        ball: Where the perturbation may go.
        steps: Gradient steps per restart; one forward pass more scores the last iterate.
        step_size: Length of a step in the units of `ball.eps`; None is `default_step`.
        noise: Random start; None starts at the clean image, whose gradient is zero for an embedding distance to
            the model's own clean embedding.
        restarts: Independent starts, of which the best counts; more than one needs `noise`.
        fooled: If given, an image that it flags is finished: it is returned as it is and leaves the batch. The
            objective must then offer `take(rows)`.

    Returns:
        Adversarial images in [0, 1] of the same shape, at most `ball.eps` away, detached.

    Raises:
        ValueError: If a setting makes no sense.

    Reference:
        Madry et al. 2018, https://huggingface.co/papers/1706.06083.
    """
    size = _step_length(steps, step_size, ball)
    search = Search(objective, images, ball, noise, restarts, fooled)
    for run in search.runs():
        adversarial = run.start()
        for _ in range(steps):
            losses, gradient = run.ask(adversarial)
            # Before the step: this pass, which the gradient needs, scores the iterate that it starts from.
            going = run.offer(adversarial, losses)
            adversarial = adversarial.detach()
            if going is not None:
                run.keep(going)
                adversarial, gradient = adversarial[going], gradient[going]
                if len(going) == 0:
                    break
            adversarial = ball.project(adversarial + size * ball.ascend(gradient), run.images)
        else:  # not after a break: a run whose images have all fallen has no last iterate
            with torch.no_grad():
                run.offer(adversarial, run.objective(adversarial))
    return search.result()


def ascend(run: Run, adversarial: Tensor, size: float) -> Tensor:
    """The step of `pgd_last`."""
    _, gradient = run.ask(adversarial)
    return run.ball.project(adversarial.detach() + size * run.ball.ascend(gradient), run.images)


def pgd_last(
    objective: Objective,
    images: Tensor,
    ball: Ball,
    *,
    steps: int,
    step_size: float | None = None,
    noise: StartNoise | None = None,
    step: Step = ascend,
) -> Tensor:
    """As `pgd`, from one start to the last iterate whatever its loss, as the published training loops run it.

    `step` may be a `CompiledStep`.
    """
    # To score the last iterate too would cost a pass, one of `steps` + 1, in every update of a training.
    size = _step_length(steps, step_size, ball)
    search = Search(objective, images, ball, noise)
    for run in search.runs():
        adversarial = run.start()
        for _ in range(steps):
            adversarial = step(run, adversarial, size)
        search.found = adversarial
    return search.result()


def default_step(steps: int, ball: Ball) -> float:
    """Length of a step of `pgd` in the units of `ball.eps`: 2.5 * eps / steps, at most 1.25 * eps."""
    # Madry et al.'s rule: the whole way is 2.5 radii long, enough to cross the ball from any start and then to move along
    # its edge. A single step of that length would only be cut off again; 1.25 * eps is Wong et al.'s.
    return min(2.5 / steps, 1.25) * ball.eps


def fgsm(objective: Objective, images: Tensor, ball: Ball, *, noise: StartNoise | None = None) -> Tensor:
    """One step of length `eps` from the clean image, the published form, or of 1.25 * eps from a random start.

    Reference:
        Goodfellow et al. 2015, https://huggingface.co/papers/1412.6572; with a random start Wong et al. 2020,
        https://huggingface.co/papers/2001.03994.
    """
    # From a random start the step must be longer than eps, or it could not reach the edge from the other half.
    size = ball.eps if noise is None else None
    return pgd_last(objective, images, ball, steps=1, step_size=size, noise=noise)


def _step_length(steps: int, step_size: float | None, ball: Ball) -> float:
    check_count("steps", steps)
    if step_size is None:
        return default_step(steps, ball)
    check_length("step_size", step_size, ball.norm, zero=ball.eps == 0)
    return step_size
