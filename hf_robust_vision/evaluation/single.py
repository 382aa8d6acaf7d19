"""One sample under attack at rising radii, watched pass by pass: for a person who looks on while the attack runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_robust_vision.attacks import Objective
from hf_robust_vision.attacks.objectives import PerSample
from hf_robust_vision.towers.base import attack_mode

from .task import Batch, RobustnessProtocol, Stage, Task, Verdict, need_usable


Watch = Callable[[float, float], None]  # told the share of the work that is done, and the radius; may raise to end it


@dataclass(frozen=True)
class Attempt:
    """The worst image that the attacks of a radius and of those below it found, and what the model says about it."""

    eps: float  # 0 for the clean image
    image: Tensor  # in [0, 1], shape (3, height, width)
    verdict: Verdict


@dataclass
class _Meter:
    """Counts passes of the attack, of which there are at most `total`."""

    watch: Watch
    total: int
    done: int = 0

    def tell(self, eps: float) -> None:
        """Before each pass."""
        self.watch(min(self.done / self.total, 1.0), eps)
        self.done += 1


@dataclass(frozen=True)
class _Watched(PerSample):
    """An objective whose passes are counted."""

    objective: Objective
    meter: _Meter
    eps: float

    def __call__(self, images: Tensor) -> Tensor:
        """Loss per image, shape (batch,)."""
        self.meter.tell(self.eps)
        return self.objective(images)


def attack_sample(task: Task, how: RobustnessProtocol, watch: Watch | None = None) -> list[Attempt]:
    """Attack the only sample of a task as the engine does: its clean image first, then one attempt a radius.

    Once it has fallen, or where it is lost before, it is not attacked any more: the smaller ball lies inside the larger
    one. Of images that do equal harm the one of the largest radius is kept.

    Raises:
        ValueError: If the model can not be attacked (float16, offloaded), or as the task's judge.
    """
    need_usable(task.model)
    how, _ = task.fit(how)
    levels = task.levels(how)
    meter = _Meter(
        watch or (lambda share, eps: None), sum(_passes(stage) for level in levels for stage in level.stages)
    )
    with attack_mode(task.model):
        image = task.load(0)[None].to(task.weight.device)
        with torch.no_grad():
            clean = task.judge(Batch((0,), image), image)
        batch = Batch((0,), image, tuple(clean))
        attempts, worst, planned = [Attempt(0.0, image[0], clean[0])], Attempt(0.0, image[0], clean[0]), 0
        for level in levels:
            for stage in level.stages:
                if not worst.verdict.lost:
                    objective, fooled = task.aim(stage, batch)
                    watched = _Watched(objective, meter, level.value)
                    found = stage.attack.run(watched, image, stage.ball, task.starts(stage, batch, how.seed), fooled)
                    with torch.no_grad():
                        (verdict,) = task.judge(batch, found)
                    if verdict.harm >= worst.verdict.harm:
                        worst = Attempt(level.value, found[0], verdict)
                planned += _passes(stage)
                meter.done = planned  # what fell early leaves passes over
            attempts.append(replace(worst, eps=level.value))
    return attempts


def _passes(stage: Stage) -> int:
    return (stage.attack.steps + 1) * stage.attack.restarts
