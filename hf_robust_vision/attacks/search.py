"""What the loops of all attacks share: the images that are left, the best found so far, the guard of the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import cast

import torch
from torch import Tensor

from .balls import Ball
from .noise import StartNoise
from .objectives import Objective, Success


class NonFiniteGradientWarning(UserWarning):
    """The attack met gradients that are not numbers; they were set to zero and counted."""


def value_and_gradient(objective: Objective, images: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (batch,) and their gradient with respect to the images; no parameter gradient is touched."""
    with torch.enable_grad():
        losses = objective(images.requires_grad_(True))
        if losses.shape != (len(images),):
            raise ValueError(
                f"an objective must give one loss per image, shape ({len(images)},), got {tuple(losses.shape)}."
            )
        # Of the sum, not of the mean: an image's step must not depend on how many others are in the batch. And by
        # `grad`, not `backward`: in training the parameters' gradients are the learner's.
        (gradient,) = torch.autograd.grad(losses.sum(), images)
    # APGD counts in the dtype of the losses, and bfloat16 can not count beyond 256.
    return losses.detach().to(torch.promote_types(losses.dtype, torch.float32)), gradient


def mended(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient with zeros in the place of what is not finite, and the number of images that held such."""
    bad = (~gradient.isfinite()).flatten(1).any(1).sum()
    return gradient.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), bad


def check_count(name: str, value: object) -> None:
    """Refuse a number of steps, restarts or queries that is not one: an attack that does nothing measures nothing."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}.")


@dataclass
class Search:
    """One attack on one batch: what to give back for each image, and the runs that look for better.

    The fields are the arguments that `pgd` explains.
    """

    objective: Objective
    images: Tensor
    ball: Ball
    noise: StartNoise | None = None
    restarts: int = 1
    fooled: Success | None = None

    def __post_init__(self) -> None:
        check_count("restarts", self.restarts)
        if self.restarts > 1 and self.noise is None:
            raise ValueError(
                f"restarts={self.restarts} without noise would repeat the same run; pass noise=StartNoise(...)."
            )
        self.images = self.images.detach()
        device = self.images.device
        self.found = self.images.clone()
        # So that losses of every precision are compared as they are; mps has no float64.
        precision = torch.float32 if device.type == "mps" else torch.float64
        self.losses = torch.full((len(self.images),), -torch.inf, device=device, dtype=precision)
        self.finished = torch.zeros(len(self.images), dtype=torch.bool, device=device)
        self._bad = torch.zeros((), dtype=torch.long, device=device)
        self._seen = 0

    def runs(self) -> Iterator[Run]:
        """The restarts, each on the images that none before it has finished; none where the ball is a point."""
        for restart in range(self.restarts if self.ball.eps > 0 else 0):
            rows = (~self.finished).nonzero().flatten()
            if len(rows) == 0:
                return
            run = Run(self, restart)
            if len(rows) < len(run.rows):
                run.keep(rows)
            yield run

    def guard(self, gradient: Tensor) -> Tensor:
        """The gradient as `mended` gives it; what was not finite is counted."""
        whole, bad = mended(gradient)
        self.note(bad, len(gradient))
        return whole

    def note(self, bad: Tensor, seen: int) -> None:
        """Count so many image gradients, of which `bad`, a number on the device, held values that are not finite."""
        # On the device: to look at it in every step would make the host wait.
        self._bad += bad
        self._seen += seen

    def result(self) -> Tensor:
        """What was found, with a warning if any gradient on the way was not finite."""
        if count := int(self._bad.item()):
            warnings.warn(
                f"{count} of {self._seen} image gradients held values that are not finite; they were set to zero. "
                "The attack is weaker than it claims: check the model, or run it in float32.",
                NonFiniteGradientWarning,
                stacklevel=3,
            )
        return self.found


class Run:
    """One restart: the images that it still works on, their rows in the batch, and all that closes over them."""

    def __init__(self, search: Search, restart: int):
        self.search, self.restart, self.ball = search, restart, search.ball
        self.rows = torch.arange(len(search.images), device=search.images.device)
        self.objective, self.images = search.objective, search.images
        self.fooled, self.noise = search.fooled, search.noise

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

    def start(self) -> Tensor:
        """Where this restart begins: a random point of the ball, or the clean image without noise."""
        if self.noise is None:
            return self.images.clone()
        return self.ball.start(self.images, self.noise.draw(self.images, self.restart))

    def ask(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and guarded gradient at some iterate, see `value_and_gradient`."""
        losses, gradient = value_and_gradient(self.objective, images)
        return losses, self.search.guard(gradient)

    @property
    def best_losses(self) -> Tensor:
        """Of the best found so far, over all restarts; -inf where there is none."""
        return self.search.losses[self.rows]

    def offer(self, adversarial: Tensor, losses: Tensor) -> Tensor | None:
        """Keep what is better or fooled; say which rows of the run go on, or None for all of them."""
        # `adversarial` is the very tensor that the objective has just seen, so that `Logits` answers `fooled` from
        # memory: whether an iterate fools costs no pass of its own.
        hit = self.fooled(adversarial) if self.fooled is not None else None
        better = losses > self.best_losses
        # What fools is kept even at a lower loss than before: the loss is the way, to fool is the end.
        return self.accept(adversarial, losses, better if hit is None else better | hit, hit)

    def accept(self, adversarial: Tensor, losses: Tensor, take: Tensor, done: Tensor | None) -> Tensor | None:
        """Keep the rows flagged by `take`, and end those flagged by `done`; see `offer`."""
        rows = self.rows[take]
        self.search.found[rows] = adversarial.detach()[take]
        self.search.losses[rows] = losses[take].to(self.search.losses.dtype)
        # Once a step the host waits for the device here: what has fallen costs no further step.
        if done is None or not bool(done.any()):
            return None
        self.search.finished[self.rows[done]] = True
        return (~done).nonzero().flatten()
