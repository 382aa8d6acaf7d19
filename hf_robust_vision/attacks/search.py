"""What the loops of all attacks share: the survivors of a batch, the best image so far, the guard of its gradients."""

from __future__ import annotations

import warnings
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
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    return losses.detach().float() if losses.dtype in (torch.half, torch.bfloat16) else losses.detach(), gradient


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
    """The images that one restart still works on: their rows in the batch, and all that closes over them."""

    def __init__(
        self, rows: Tensor, objective: Objective, fooled: Success | None, images: Tensor, noise: StartNoise | None
    ):
        self.rows = torch.arange(len(images), device=images.device)
        self.objective, self.fooled, self.images, self.noise = objective, fooled, images, noise
        if len(rows) < len(images):
            self.keep(rows)

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

    def __init__(self, images: Tensor, best: bool):
        self.images = images.clone()
        self.best = best
        self.losses = torch.full((len(images),), -torch.inf, device=images.device, dtype=torch.float64)
        if images.device.type == "mps":  # no float64 there
            self.losses = self.losses.float()
        self.finished = torch.zeros(len(images), dtype=torch.bool, device=images.device)

    def unfinished(self) -> Tensor:
        """Rows that no restart has fooled yet."""
        return (~self.finished).nonzero().flatten()

    def offer(self, run: Survivors, adversarial: Tensor, losses: Tensor) -> Tensor | None:
        """Keep what is better or fooled; say which rows of the run go on, or None for all of them."""
        if not self.best:
            return None
        hit = run.fooled(adversarial) if run.fooled is not None else None
        better = losses > self.losses[run.rows]
        take = better if hit is None else better | hit
        rows = run.rows[take]
        self.images[rows] = adversarial.detach()[take]
        self.losses[rows] = losses[take].to(self.losses.dtype)
        if hit is None or not bool(hit.any()):
            return None
        self.finished[run.rows[hit]] = True
        return (~hit).nonzero().flatten()

    def offer_last(self, run: Survivors, adversarial: Tensor) -> None:
        """Score the last iterate of a run without its gradient, or simply keep it."""
        if not self.best:
            self.images[run.rows] = adversarial
            return
        with torch.no_grad():
            self.offer(run, adversarial, run.objective(adversarial))
