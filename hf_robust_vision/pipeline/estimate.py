"""What a measurement will cost, said before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from hf_robust_vision.evaluation.task import Batch, Level, RobustnessProtocol, Task
from hf_robust_vision.processes import rank_and_world
from hf_robust_vision.towers.base import attack_mode


TIMED = 8  # images of the timed pass; a GPU is faster with a full batch, which makes the estimate a bound


def say_cost(task: Task, how: RobustnessProtocol, fewer: str, *, models: int = 1) -> None:
    """Print the attacks that a task allows, how many passes they take at most, and, by timing one, how long that is.

    `fewer` is what to type for fewer images; so many `models` will be measured alike.
    """
    rank, world = rank_and_world()
    if rank > 0:
        return
    how, left_out = task.fit(how)
    missing = f"\n  left out, not defined for so few classes: {', '.join(left_out)}" if left_out else ""
    print(f"{how}{missing}", flush=True)
    levels = task.levels(how)
    each = sum(stage.attack.steps * stage.attack.restarts for level in levels for stage in level.stages)
    if not each:
        return
    passes = each * len(task.ids) * models
    seconds = passes * seconds_of_a_pass(task, levels) / world
    radii = "radius" if len(levels) == 1 else "radii"
    print(
        f"to measure: {models * len(task.ids):,} images x {each:,} attack steps over {len(levels)} {radii} = at most "
        f"{passes:,} passes, about {pretty_seconds(seconds)} here; an image that has fallen is not attacked again. For "
        f"fewer images: {fewer}",
        flush=True,
    )


def seconds_of_a_pass(task: Task, levels: Sequence[Level], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one image takes in one gradient step; `time.process_time` leaves out what others take of a CPU."""
    stage = next(stage for level in levels for stage in level.stages)
    places = tuple(range(min(TIMED, len(task.ids))))
    size = task.load(0).shape
    loaded = [(place, image) for place in places for image in [task.load(place)] if image.shape == size]
    images = torch.stack([image for _, image in loaded]).to(task.weight.device)
    batch = Batch(tuple(place for place, _ in loaded), images)
    with attack_mode(task.model):
        with torch.no_grad():
            clean = tuple(task.judge(batch, batch.images))
        batch = Batch(batch.places, batch.images, clean)
        spent = []  # the quickest of three: the first one warms up, and others may use the machine, too
        for _ in range(3):
            start = clock()
            objective, _ = task.aim(stage, batch)
            images = batch.images.clone().requires_grad_(True)
            float(torch.autograd.grad(objective(images).sum(), images)[0].sum())  # waits for the device
            spent.append(clock() - start)
    return min(spent) / len(loaded)


def pretty_seconds(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
