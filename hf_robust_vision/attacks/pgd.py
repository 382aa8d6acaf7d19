"""Projected gradient descent, and the fast gradient sign method as its one-step form."""

from __future__ import annotations

from torch import Tensor

from .balls import Ball, check_length
from .noise import StartNoise
from .objectives import Objective, Success
from .search import GradientGuard, Keeper, Survivors, check_settings, value_and_gradient


def pgd(
    objective: Objective,
    images: Tensor,
    ball: Ball,
    *,
    steps: int,
    step_size: float | None = None,
    noise: StartNoise | None = None,
    restarts: int = 1,
    best: bool = True,
    fooled: Success | None = None,
) -> Tensor:
    """Raise an objective inside a ball by projected gradient steps.

    Args:
        objective: Images in [0, 1] to one loss per image.
        images: Clean images in [0, 1], shape (batch, 3, height, width).
        ball: Where the perturbation may go.
        steps: Gradient steps per restart.
        step_size: Length of a step in the units of `ball.eps`; None is `default_step`.
        noise: Random start; None starts at the clean image, whose gradient is zero for an embedding distance to
            the model's own clean embedding.
        restarts: Independent starts, of which the best counts; more than one needs `noise`.
        best: Give the iterate with the highest loss, for one more forward pass. False gives the last iterate, as
            the published training loops do.
        fooled: If given, an image that it flags is finished: it is returned as it is and leaves the batch. The
            objective must then offer `take(rows)`.

    Returns:
        Adversarial images in [0, 1] of the same shape, at most `ball.eps` away, detached.

    Raises:
        ValueError: If a setting makes no sense.

    Reference:
        Madry et al. 2018, https://huggingface.co/papers/1706.06083.
    """
    check_settings(steps, restarts, noise)
    size = default_step(steps, ball) if step_size is None else step_size
    if step_size is not None:
        check_length("step_size", step_size, ball.norm, zero=ball.eps == 0)
    whole = Survivors(objective, fooled, images.detach(), noise)
    keeper = Keeper(whole.images, best or restarts > 1 or fooled is not None)
    guard = GradientGuard(images.device)
    for restart, run in keeper.runs(whole, ball, restarts):
        adversarial = run.start(ball, restart)
        for _ in range(steps):
            losses, gradient = value_and_gradient(run.objective, adversarial)
            # Before the step: this pass, which the gradient needs, scores the iterate that it starts from.
            going = keeper.offer(run, adversarial, losses)
            adversarial, gradient = adversarial.detach(), guard(gradient)
            if going is not None:
                run.keep(going)
                adversarial, gradient = adversarial[going], gradient[going]
                if len(going) == 0:
                    break
            adversarial = ball.project(adversarial + size * ball.ascend(gradient), run.images)
        else:  # not after a break: a run whose images have all fallen has no last iterate
            keeper.offer_last(run, adversarial)
    guard.report()
    return keeper.images


def default_step(steps: int, ball: Ball) -> float:
    """Length of a step of `pgd` in the units of `ball.eps`: 2.5 * eps / steps, at most 1.25 * eps."""
    return min(2.5 / steps, 1.25) * ball.eps


def fgsm(objective: Objective, images: Tensor, ball: Ball, *, noise: StartNoise | None = None) -> Tensor:
    """One step of length `eps` (from the clean image), or of 1.25 * eps from a random start.

    Args:
        objective: Images in [0, 1] to one loss per image.
        images: Clean images in [0, 1], shape (batch, 3, height, width).
        ball: Where the perturbation may go.
        noise: Random start, or None for the published form.

    Reference:
        Goodfellow et al. 2015, https://huggingface.co/papers/1412.6572; with a random start Wong et al. 2020,
        https://huggingface.co/papers/2001.03994.
    """
    # The default of one step, 1.25 * eps, is Wong et al.'s: longer than eps, so that the start does not hold it back.
    size = ball.eps if noise is None else None
    return pgd(objective, images, ball, steps=1, step_size=size, noise=noise, best=False)
