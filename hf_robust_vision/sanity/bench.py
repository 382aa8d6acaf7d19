"""What sanity checks have in common: samples on trial, the attacks on them that several checks share, and a verdict."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.attacks import Ball, Objective, StartNoise, Success, make_ball


# Set, like the thresholds of `checks`, before any model was looked at.
# Share of the samples by which a comparison may come out on the wrong side. Of 100 samples five turn on luck; a model
# that masks its gradients loses tens of points.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Trial(ABC):
    """A batch of samples that the model gets right, and all that checks need to know of their task.

    Args:
        images: Clean, in [0, 1], shape (batch, 3, height, width).
        noise: One id a sample.
    """

    images: Tensor
    noise: StartNoise

    @property
    @abstractmethod
    def loss(self) -> Objective:
        """What an attacker raises who follows the gradient."""

    @property
    @abstractmethod
    def margin(self) -> Objective:
        """What an attacker raises who has no gradient: how near the answer is to a wrong one."""

    @property
    @abstractmethod
    def fooled(self) -> Success:
        """Where an attack may stop."""

    @abstractmethod
    def scores(self, images: Tensor) -> Tensor:
        """The numbers that the answers are chosen by, shape (batch, ..., choices)."""

    @abstractmethod
    def attack(self, ball: Ball, steps: int) -> Tensor:
        """Which samples the white-box attacks of the measurement win, shape (batch,)."""

    @abstractmethod
    def take(self, rows: Tensor) -> Trial:
        """The same for some of the samples."""

    def lost(self, images: Tensor) -> Tensor:
        """The verdict on any images of the same shape, boolean flags of shape (batch,)."""
        with torch.no_grad():
            return self.fooled(images)


@dataclass(frozen=True)
class Bench:
    """The samples, and which of them the white-box attacks win at any radius and budget; each of these is run once.

    Args:
        trials: The samples in batches of one image size.
        norm: Of the measurement.
        eps: Its radii.
        steps: Its steps.
        chance: Share of the samples that may stand where all images can be made equal; None where the task sets none.
        chance_is: What that share is, in words.
        stronger: What to try where the attacks are too weak.
    """

    trials: Sequence[Trial]
    norm: str
    eps: Sequence[float]
    steps: int
    chance: float | None
    chance_is: str
    stronger: str
    _flags: dict[tuple[float, int], Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(len(trial.images) for trial in self.trials)

    @property
    def ball(self) -> Ball:
        """Of the largest radius of the measurement."""
        return make_ball(self.norm, max(self.eps))

    def each(self, function: Callable[[Any], Tensor], wanted: Tensor | None = None) -> Tensor:
        """What a function of a trial gives for each sample; False for those that are not `wanted`."""
        flags = torch.ones(len(self), dtype=torch.bool) if wanted is None else wanted
        values, start = [], 0
        for trial in self.trials:
            count = len(trial.images)
            rows = flags[start : start + count].nonzero().flatten()
            start += count
            if len(rows):
                part = trial if len(rows) == count else trial.take(rows.to(trial.images.device))
                values.append(function(part).cpu())
        if not values:
            return torch.zeros(len(self), dtype=torch.bool)
        found = torch.cat(values)
        whole = found.new_zeros(len(self), *found.shape[1:])
        whole[flags] = found
        return whole

    def attacked(self, ball: Ball, steps: int) -> Tensor:
        """Which samples fall, independent of every other radius and budget."""
        if (ball.eps, steps) not in self._flags:
            self._flags[ball.eps, steps] = self.each(lambda trial: trial.attack(ball, steps))
        return self._flags[ball.eps, steps]

    def white(self) -> Tensor:
        """Which samples fall to the measurement, at its largest radius."""
        return self.attacked(self.ball, self.steps)


def right_on_grey(trials: Sequence[Trial]) -> float:
    """Share of the samples that are answered rightly without looking: their image is grey."""
    lost = torch.cat([trial.lost(torch.full_like(trial.images, 0.5)).cpu() for trial in trials])
    return standing(lost)


def standing(fooled: Tensor) -> float:
    """Share of the samples that stand."""
    return 1 - fooled.double().mean().item()


def check(
    name: str,
    why: str,
    numbers: dict[str, Any] | None,
    key: str,
    *,
    most: float | None = None,
    least: float | None = None,
) -> dict[str, Any]:
    """One check: what its name says holds where it passed. Without numbers it was not run."""
    sign, limit = ("<=", most) if most is not None else (">=", least)
    assert limit is not None
    if numbers is None:
        verdict = "not run"
    else:
        # A value that is not a number satisfies neither.
        holds = numbers[key] <= limit + 1e-9 if most is not None else numbers[key] >= limit - 1e-9
        verdict = "passed" if holds else "flagged"
    plain = {word: _plain(value) for word, value in (numbers or {}).items()}
    return {"name": name, "verdict": verdict, "numbers": plain, "threshold": f"{key} {sign} {limit:.3g}", "why": why}


def _plain(value: Any) -> Any:
    """Rounded; None for what JSON can not hold."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
