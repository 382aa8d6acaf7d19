"""What sanity checks have in common: samples on trial, the attacks on them that several checks share, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.attacks import Attack, Ball, LinfBall, Objective, Protocol, StartNoise, Success, make_ball
from hf_robust_vision.attacks.objectives import PerSample
from hf_robust_vision.evaluation.task import Batch, RobustnessProtocol, Stage, Task, Verdict, one_size
from hf_robust_vision.pixels import GREY


# Set, like the thresholds of `checks`, before any model was looked at.
# Share of the samples by which a comparison may come out on the wrong side. Of 100 samples five turn on luck; a model
# that masks its gradients loses tens of points.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Trial(PerSample):
    """A batch of samples that the model gets right, and all that checks ask of their task.

    `white` are the attacks of the measurement that follow a gradient, `seed` is that of the random starts.
    """

    task: Task
    batch: Batch
    white: Protocol
    seed: int

    @property
    def images(self) -> Tensor:
        """Clean, in [0, 1], shape (batch, 3, height, width)."""
        return self.batch.images

    @property
    def noise(self) -> StartNoise:
        """One id a sample."""
        return StartNoise(self.seed, [self.task.ids[place] for place in self.batch.places])

    @property
    def loss(self) -> Objective:
        """What an attacker raises who follows the gradient."""
        return self._aim(self.task.loss)[0]

    @property
    def margin(self) -> Objective:
        """What an attacker raises who has no gradient: how near the answer is to a wrong one."""
        return self._aim(self.task.margin)[0]

    @property
    def fooled(self) -> Success:
        """Where an attack may stop."""
        fooled = self._aim(self.task.loss)[1]
        if fooled is None:
            raise ValueError(
                f"a {self.task.task} has a score and no success: there is nothing that checks could count."
            )
        return fooled

    def attack_with(self, protocol: Protocol, ball: Ball) -> Tensor:
        """Which samples fall to a protocol."""
        lost = torch.zeros(len(self.images), dtype=torch.bool, device=self.images.device)
        for attack in protocol.attacks:
            for target in range(attack.targets or 1):
                rows = (~lost).nonzero().flatten()
                if len(rows):
                    left = self.take(rows)
                    lost[rows] = left.lost(self.task.strike(Stage(attack, ball, target), left.batch, self.seed))
        return lost

    @torch.no_grad()
    def lost(self, images: Tensor) -> Tensor:
        """The verdict on any images of the same shape, boolean flags of shape (batch,)."""
        verdicts = self.task.judge(self.batch, images)
        return torch.tensor([verdict.lost for verdict in verdicts], device=images.device)

    def _aim(self, objective: str) -> tuple[Objective, Success | None]:
        return self.task.aim(Stage(Attack("probe", objective=objective), LinfBall(1)), self.batch)


def pick(task: Task, how: RobustnessProtocol, samples: int) -> list[Trial]:
    """The first samples, in a seeded order, that are not lost before any attack, in batches of one image size."""
    white = replace(how.protocol, attacks=tuple(a for a in how.protocol.attacks if a.algorithm != "square"))
    # Seeded, not the first of the dataset: these may all be of one class.
    order = torch.randperm(len(task.ids), generator=torch.Generator().manual_seed(how.seed)).tolist()
    right: dict[int, tuple[Tensor, Verdict]] = {}
    for start in range(0, len(order), how.batch_size):
        loaded = [(place, task.load(place)) for place in order[start : start + how.batch_size]]
        for batch in one_size(loaded, how.batch_size, task.weight.device):
            with torch.no_grad():
                clean = task.judge(batch, batch.images)
            seen = zip(batch.places, batch.images, clean)
            right |= {place: (image, verdict) for place, image, verdict in seen if not verdict.lost}
        if len(right) >= samples:
            break
    if not right:
        raise ValueError(f"the model is right about none of {len(task.ids)} samples: there is nothing to attack.")
    kept = [(place, image) for place, (image, _) in right.items()][:samples]
    batches = one_size(kept, how.batch_size, task.weight.device)
    known = [replace(batch, clean=tuple(right[place][1] for place in batch.places)) for batch in batches]
    return [Trial(task, batch, white, how.seed) for batch in known]


@dataclass(frozen=True)
class Bench:
    """The samples, and which of them the white-box attacks win at any radius and budget; each of these is run once."""

    trials: Sequence[Trial]
    norm: str
    eps: Sequence[float]
    steps: int
    chance: float | None  # share that may stand where all images can be made equal; None where the task sets none
    chance_is: str  # what that share is, in words
    stronger: str  # what to try where the attacks are too weak
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
            self._flags[ball.eps, steps] = self.each(
                lambda trial: trial.attack_with(trial.white.with_budget(steps=steps), ball)
            )
        return self._flags[ball.eps, steps]

    def white(self) -> Tensor:
        """Which samples fall to the measurement, at its largest radius."""
        return self.attacked(self.ball, self.steps)


def right_on_grey(trials: Sequence[Trial]) -> float:
    """Share of the samples that are answered rightly without looking: their image is grey."""
    return standing(torch.cat([trial.lost(torch.full_like(trial.images, GREY)).cpu() for trial in trials]))


def standing(fooled: Tensor) -> float:
    """Share of the samples that stand."""
    return 1 - fooled.double().mean().item()


def check(
    name: str, why: str, numbers: dict[str, Any] | None, key: str, *, most: float = math.inf, least: float = -math.inf
) -> dict[str, Any]:
    """One check: what its name says holds where it passed. Without numbers it was not run."""
    sign, limit = ("<=", most) if most < math.inf else (">=", least)
    if numbers is None:
        verdict = "not run"
    else:  # a value that is not a number satisfies neither
        verdict = "passed" if least - 1e-9 <= numbers[key] <= most + 1e-9 else "flagged"
    plain = {word: _plain(value) for word, value in (numbers or {}).items()}
    return {"name": name, "verdict": verdict, "numbers": plain, "threshold": f"{key} {sign} {limit:.3g}", "why": why}


def _plain(value: Any) -> Any:
    """Rounded; None for what JSON can not hold."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
