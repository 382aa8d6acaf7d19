"""FAB: walks along the decision boundary towards the clean image, to the smallest perturbation that fools."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from .balls import Ball
from .noise import StartNoise
from .objectives import Objective, Success
from .search import Search, check_count


OVERSHOOT = 1.05  # how far beyond the linearised boundary a step goes: exactly on it nothing is fooled yet
HOMEWARD = 0.1  # largest weight of the step that starts at the clean image, where the plane is least true
RETREAT = 0.9  # share of the perturbation that is kept after an iterate has fooled


def fab(
    objective: Objective,
    images: Tensor,
    ball: Ball,
    *,
    fooled: Success,
    steps: int = 100,
    noise: StartNoise | None = None,
    restarts: int = 1,
    nearest: bool = False,
) -> Tensor:
    """Search the smallest perturbation across the zero level of an objective, per image.

    With `TargetedMargin` as the objective it is FAB-T: the boundary of one wrong class at a time.

    Args:
        objective: Images in [0, 1] to one value per image: below zero on this side of the boundary, above it beyond.
            It must offer `take(rows)`.
        images: As in `pgd`.
        ball: What is near enough; its `eps` does not steer the search.
        fooled: What counts as fooled.
        steps: Gradient steps per restart.
        noise: Of the random starts; the first run starts at the clean image and needs none.
        restarts: Independent runs, the later ones from a random point half way to the edge of the ball.
        nearest: Go on to the nearest fooling image. By default an image leaves the batch with the first one inside
            the ball, which gives the same flags.

    Returns:
        Images in [0, 1] of the same shape, detached: a fooling one inside the ball where one was found, else the
        clean one.

    Raises:
        ValueError: If a setting makes no sense.

    Reference:
        Croce and Hein 2020, https://huggingface.co/papers/1907.02044, algorithm 1.
    """
    check_count("steps", steps)
    if fooled is None:
        raise ValueError("fab looks for the nearest image that fools: it needs to be told what fools (fooled=).")
    search = Search(objective, images, ball, noise, restarts, fooled)
    for run in search.runs():
        # Half way, as published: well inside of the radius that counts, and far enough to meet another part of the boundary.
        current = run.images.clone() if run.restart == 0 else (run.images + run.start()) / 2
        for _ in range(steps):
            values, gradient = run.ask(current)
            current = _step(current.detach(), run.images, values, gradient, ball)
            # With its graph kept: where nothing is fooled, `Logits` gives the next gradient without another pass.
            with torch.enable_grad():
                hits = cast(Success, run.fooled)(current.requires_grad_(True))
            # The distance takes the place of the loss, with its sign turned: the nearest is the best.
            distance = ball.distance(current.detach(), run.images)
            nearer = hits & (distance <= ball.eps) & (-distance > run.best_losses)
            going = run.accept(current, -distance, nearer, None if nearest else nearer)
            if going is not None:
                if len(going) == 0:
                    break
                run.keep(going)
                current, hits = current.detach()[going], hits[going]
            if bool(hits.any()):
                # Back over the boundary: from beyond it no step finds anything nearer.
                retreat = run.images + RETREAT * (current.detach() - run.images)
                current = torch.where(hits.view(-1, 1, 1, 1), retreat, current.detach())
    return search.result()


def _step(current: Tensor, images: Tensor, values: Tensor, gradient: Tensor, ball: Ball) -> Tensor:
    """On to the linearised boundary, from here and from the clean image, mixed by the distances of the two."""
    # The objective is taken for linear: its boundary is a plane. The point of it that is nearest to the iterate crosses
    # the boundary soonest, but drifts sideways from step to step. The one nearest to the clean image is what is wanted,
    # but the plane is only true near the iterate. So the second is a bias, whose weight falls to nothing as the iterate
    # comes near the boundary.
    at_clean = values + ((images - current) * gradient).flatten(1).sum(1)
    # Within [0, 1] from the start: a projection on the plane that is clipped afterwards would fall short of it.
    onward = ball.shortest(current, gradient, -values)
    homeward = ball.shortest(images, gradient, -at_clean)
    near, far = ball.distance(current + onward, current), ball.distance(images + homeward, images)
    share = (near / (near + far).clamp_min(1e-12)).clamp_max(HOMEWARD).view(-1, 1, 1, 1)
    return ((1 - share) * (current + OVERSHOOT * onward) + share * (images + OVERSHOOT * homeward)).clamp(0, 1)
