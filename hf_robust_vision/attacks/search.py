"""What the loops of all attacks share: the survivors of a batch, the best image so far, the guard of its gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from copy import copy
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from .balls import Ball
from .noise import StartNoise
from .objectives import Objective, Success


class NonFiniteGradientWarning(UserWarning):
    """The attack met gradients that are not numbers; they were set to zero and counted."""


class GradientGuard:
    """Counts gradients that are not finite, sets them to zero, and says so once at the end."""

    def __init__(self, device: torch.device):
        self._bad = torch.zeros((), dtype=torch.long, device=device)
        self._seen = 0

    def __call__(self, gradient: Tensor) -> Tensor:
        """The gradient with zeros in the place of what is not finite."""
        self._seen += len(gradient)
        # Counted on the device: to look at it in every step would make the host wait.
        self._bad += (~gradient.isfinite()).flatten(1).any(1).sum()
        return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def report(self) -> None:
        """Warn if any gradient was not finite."""
        if count := int(self._bad.item()):
            warnings.warn(
                f"{count} of {self._seen} image gradients held values that are not finite; they were set to zero. "
                "The attack is weaker than it claims: check the model, or run it in float32.",
                NonFiniteGradientWarning,
                stacklevel=3,
            )


def value_and_gradient(objective: Objective, images: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (batch,) and their gradient with respect to the images; no parameter gradient is touched."""
    with torch.enable_grad():
        losses = objective(images.requires_grad_(True))
        if losses.shape != (len(images),):
            raise ValueError(
                f"an objective must give one loss per image, shape ({len(images)},), got {tuple(losses.shape)}."
            )
        # Of the sum, not of the mean: an image's step must not depend on how many others are in the batch.
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    # APGD counts in the dtype of the losses, and bfloat16 can not count beyond 256.
    return losses.detach().to(torch.promote_types(losses.dtype, torch.float32)), gradient


def check_count(name: str, value: int) -> None:
    """Refuse what is not a whole number of at least 1: an attack that does nothing is no measurement."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


def check_settings(steps: int, restarts: int, noise: StartNoise | None) -> None:
    """Refuse settings that would silently do nothing or less than asked."""
    check_count("steps", steps)
    check_count("restarts", restarts)
    if restarts > 1 and noise is None:
        raise ValueError(f"restarts={restarts} without noise would repeat the same run; pass noise=StartNoise(...).")


class Survivors:
    """The images that a run still works on: their rows in the batch, and all that closes over them."""

    def __init__(self, objective: Objective, fooled: Success | None, images: Tensor, noise: StartNoise | None):
        self.rows = torch.arange(len(images), device=images.device)
        self.objective, self.fooled, self.images, self.noise = objective, fooled, images, noise

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only."""
        take = getattr(self.objective, "take", None)
        if take is None:
            raise ValueError(
                f"{self.objective!r} has no take(rows), so fooled images can not leave the batch; "
                "add it or pass fooled=None."
            )
        self.objective = cast(Objective, take(rows))
        self.fooled = self.fooled.take(rows) if self.fooled is not None else None
        self.noise = self.noise.take(rows) if self.noise is not None else None
        self.rows, self.images = self.rows[rows], self.images[rows]

    def start(self, ball: Ball, restart: int) -> Tensor:
        """Where this restart begins."""
        if self.noise is None:
            return self.images.clone()
        return ball.start(self.images, self.noise.draw(self.images, restart))


class Keeper:
    """Remembers, for every image, the adversarial image to return."""

    def __init__(self, images: Tensor, best: bool = True):
        self.images = images.clone()
        self.best = best
        # So that losses of every precision are compared as they are; mps has no float64.
        precision = torch.float32 if images.device.type == "mps" else torch.float64
        self.losses = torch.full((len(images),), -torch.inf, device=images.device, dtype=precision)
        self.finished = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def runs(self, whole: Survivors, ball: Ball, restarts: int) -> Iterator[tuple[int, Survivors]]:
        """The restarts, each on the images that none before it has finished; none where the ball is a point."""
        for restart in range(restarts if ball.eps > 0 else 0):
            rows = (~self.finished).nonzero().flatten()
            if len(rows) == 0:
                return
            run = copy(whole)
            if len(rows) < len(whole.rows):
                run.keep(rows)
            yield restart, run

    def offer(self, run: Survivors, adversarial: Tensor, losses: Tensor) -> Tensor | None:
        """Keep what is better or fooled; say which rows of the run go on, or None for all of them."""
        if not self.best:
            return None
        hit = run.fooled(adversarial) if run.fooled is not None else None
        better = losses > self.losses[run.rows]
        return self.keep(run, adversarial, losses, better if hit is None else better | hit, hit)

    def keep(
        self, run: Survivors, adversarial: Tensor, losses: Tensor, take: Tensor, done: Tensor | None
    ) -> Tensor | None:
        """Keep the rows of the run that are flagged by `take`, and end those flagged by `done`; see `offer`."""
        rows = run.rows[take]
        self.images[rows] = adversarial.detach()[take]
        self.losses[rows] = losses[take].to(self.losses.dtype)
        # Once a step the host waits for the device here: what has fallen costs no further step.
        if done is None or not bool(done.any()):
            return None
        self.finished[run.rows[done]] = True
        return (~done).nonzero().flatten()

    def offer_last(self, run: Survivors, adversarial: Tensor) -> None:
        """Score the last iterate of a run without its gradient, or simply keep it."""
        if not self.best:
            self.images[run.rows] = adversarial
            return
        with torch.no_grad():
            self.offer(run, adversarial, run.objective(adversarial))
