"""Auto-PGD: projected gradient ascent with momentum that halves its own step where it stalls."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .balls import Ball
from .noise import StartNoise
from .objectives import Objective, Success
from .search import Run, Search, check_count


FIRST_STEP = 2.0  # times eps, the diameter: at first the search may jump across the ball
MOMENTUM = 0.75  # share of the new step; the rest is the previous move
RISE_SHARE = 0.75  # a window with fewer rising steps than this halves the step
# As shares of the steps: the first window is the longest, because at the largest step the search looks for a region
# and needs time before it can be judged. Each later one is shorter, down to a least: at a smaller step there is less
# to explore, and a step that is still too long should not waste the rest of the budget.
FIRST_WINDOW, SHORTER_BY, LEAST_WINDOW = 0.22, 0.03, 0.06


def apgd(
    objective: Objective,
    images: Tensor,
    ball: Ball,
    *,
    steps: int = 100,
    noise: StartNoise | None = None,
    restarts: int = 1,
    fooled: Success | None = None,
) -> Tensor:
    """Raise an objective inside a ball with the published step-size schedule, per image.

    Arguments and result are those of `pgd`; `steps` per restart come after the first gradient at the start.

    Raises:
        ValueError: If a setting makes no sense.

    Reference:
        Croce and Hein 2020, https://huggingface.co/papers/2003.01690, algorithm 1.
    """
    check_count("steps", steps)
    search = Search(objective, images, ball, noise, restarts, fooled)
    for run in search.runs():
        _one_run(run, steps)
    return search.result()


@dataclass
class _State:
    """What the schedule remembers, one row an image. Losses are float32 at least."""

    current: Tensor
    previous: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    loss: Tensor
    step_size: Tensor
    rises: Tensor  # steps of this window whose loss was above the step before
    loss_at_check: Tensor
    halved_at_check: Tensor

    @classmethod
    def at(cls, start: Tensor, losses: Tensor, gradient: Tensor, step_size: float) -> _State:
        """The state before the first step."""
        return cls(
            current=start,
            previous=start,
            gradient=gradient,
            best=start,
            best_gradient=gradient,
            best_loss=losses,
            loss=losses,
            # One for each image: a batch mixes images that are stuck with others that still climb.
            step_size=start.new_full((len(start), 1, 1, 1), step_size),
            rises=torch.zeros_like(losses),
            loss_at_check=losses,
            # The published code starts with "already halved", so that the first check looks at oscillation only.
            halved_at_check=torch.ones_like(losses, dtype=torch.bool),
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with some rows only."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])

    def move(self, ball: Ball, images: Tensor, momentum: float) -> Tensor:
        """The next iterate: a projected step, mixed with the previous move, projected again."""
        # The last move is mixed in because steps of a fixed length zigzag across a ridge, and mixed they run along it.
        # The step is projected first, or its part outside of the ball would drown the last move.
        step = ball.project(self.current + self.step_size * ball.ascend(self.gradient), images)
        # The last move may point out of the ball, so that even a mix of two points of the ball may lie outside.
        mixed = self.current + momentum * (step - self.current) + (1 - momentum) * (self.current - self.previous)
        return ball.project(mixed, images)

    def record(self, moved: Tensor, losses: Tensor, gradient: Tensor) -> None:
        """Take the new iterate, and remember it where it is the best so far."""
        # A rise is counted against the step before, not against the best: a climb back after a bad step is progress.
        self.rises += losses > self.loss
        better = losses > self.best_loss
        pick = better.view(-1, 1, 1, 1)
        self.previous, self.current, self.gradient, self.loss = self.current, moved, gradient, losses
        self.best = torch.where(pick, moved, self.best)
        self.best_gradient = torch.where(pick, gradient, self.best_gradient)
        self.best_loss = torch.where(better, losses, self.best_loss)

    def check(self, window: int) -> None:
        """End of a window: where the loss oscillated or did not improve, halve the step and go back to the best."""
        # A step that is too long jumps to and fro over a maximum, or circles it without a new best loss. One that was
        # halved a window ago gets this window before it is called stalled.
        oscillated = self.rises <= RISE_SHARE * window
        stalled = ~self.halved_at_check & (self.loss_at_check >= self.best_loss)
        halve = oscillated | stalled
        self.halved_at_check, self.loss_at_check = halve, self.best_loss
        self.rises = torch.zeros_like(self.rises)
        pick = halve.view(-1, 1, 1, 1)
        self.step_size = torch.where(pick, self.step_size / 2, self.step_size)
        # To the best image, because the smaller step is to search its neighbourhood: where the long one led last is an
        # accident. `previous` stays, as in the published code, so that the first mix after a return holds the way from
        # the iterate before the last one to the best, which was never a step.
        self.current = torch.where(pick, self.best, self.current)
        self.gradient = torch.where(pick, self.best_gradient, self.gradient)  # kept, so that going back is free


def _one_run(run: Run, steps: int) -> None:
    scored = run.start()
    losses, gradient = run.ask(scored)
    state = _State.at(scored.detach(), losses, gradient, FIRST_STEP * run.ball.eps)
    window, shorter, least = (max(int(share * steps), 1) for share in (FIRST_WINDOW, SHORTER_BY, LEAST_WINDOW))
    since_check = 0
    for step in range(steps):
        going = run.offer(scored, state.loss)
        if going is not None:
            if len(going) == 0:
                return
            run.keep(going)
            state.keep(going)
        # There is no move before the first one that it could be mixed with.
        scored = state.move(run.ball, run.images, 1.0 if step == 0 else MOMENTUM)
        losses, gradient = run.ask(scored)
        state.record(scored.detach(), losses, gradient)
        since_check += 1
        if since_check == window:
            # The check may put `current` back to the best image; `scored` stays what the loss was taken at.
            state.check(window)
            window, since_check = max(window - shorter, least), 0
    run.offer(scored, state.loss)
