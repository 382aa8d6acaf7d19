"""Checks against gradient masking: what a robust accuracy must show before it is believed, whatever the task.

A model whose gradients say nothing looks robust to every attack that follows them. Each check here is something that
an attack which works can not fail, after Athalye et al. 2018 (https://huggingface.co/papers/1802.00420) and Carlini et
al. 2019 (https://huggingface.co/papers/1902.06705). A model that passes them all is not proven robust; one that fails
one is measured wrongly until somebody finds out why.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.attacks import Ball, make_ball, pgd
from hf_robust_vision.attacks.search import value_and_gradient
from hf_robust_vision.evaluation.task import Task

from .bench import TOLERANCE, Bench, Trial, check, standing
from .rivals import another_loss, black_box, transfer


# The thresholds were written down before any model, masked or honest, was looked at.

# Passes over one image may differ by rounding: in float32 by a millionth of the logits' range, less than this; in
# a lower precision by its own last digit.
SAME_ANSWER = 1e-3
PASSES = 10  # two draws of a random defence agree now and then
# An ascent that keeps its best iterate fails to raise the loss only where it sees no slope; noise raises half of them.
LOSS_RISES = 0.9
# In many dimensions a random direction is nearly harmless at a radius where the worst one is deadly: somewhere on the
# curve an attack that works must lead by far more than `TOLERANCE`.
OVER_NOISE = 0.2
NOISE_DRAWS = 10  # of which each sample meets the worst; a gradient attack without a gradient has one start
PROBE_STEPS = 10  # of the ascent that looks at the loss alone

_NOISE_RESTART = 1_000_000  # no attack restarts that often, so that none shares a draw with the baseline


def run_checks(bench: Bench, task: Task, queries: int, surrogate: Task | None) -> dict[str, Any]:
    """All checks, as `RobustnessResult.sanity` holds them.

    Returns:
        Plain values for JSON: `verdict` ("passed", or "flagged" if one check was), `flagged` (their names), `checks`
        (each with `name`, `verdict` ("passed", "flagged", "not run"), `numbers`, `threshold` and `why`), and what was
        looked at. Shares are over the samples, in [0, 1].
    """
    checks = [
        same_answer(bench),
        gradients(bench),
        loss_rises(bench),
        *more_steps(bench),
        *radii(bench),
        another_loss(bench, *task.other_loss(bench.steps)),
        black_box(bench, queries),
        transfer(bench, surrogate),
    ]
    flagged = [check["name"] for check in checks if check["verdict"] == "flagged"]
    return {
        "verdict": "flagged" if flagged else "passed",
        "flagged": flagged,
        "checks": checks,
        "num_samples": len(bench),
        "steps": bench.steps,
        "norm": bench.norm,
        "eps": bench.ball.eps,
    }


def not_run(why: object, **about: Any) -> dict[str, Any]:
    """The same shape where nothing could be checked."""
    return {"verdict": "not run", "flagged": [], "checks": [], "why": str(why), **about}


def same_answer(bench: Bench) -> dict[str, Any]:
    """Is the model a function of its image?"""
    limits = [SAME_ANSWER]

    def change(trial: Trial) -> Tensor:
        # Of a clone each time: an objective may remember its latest answer.
        with torch.no_grad():
            first, *others = (trial.task.scores(trial.batch, trial.images.clone()) for _ in range(PASSES))
        limits.append(torch.finfo(first.dtype).eps)
        moved = torch.stack([(other - first).flatten(1).abs().amax(1) for other in others]).amax(0)
        turned = torch.stack([(other.argmax(-1) != first.argmax(-1)).reshape(len(first), -1) for other in others])
        spread = first.flatten(1).amax(1) - first.flatten(1).amin(1)
        smallest = torch.finfo(first.dtype).tiny
        return torch.stack([moved / spread.clamp_min(smallest), turned.any(2).any(0)], 1).double()

    moved, turned = bench.each(change).unbind(1)
    return check(
        "same answer twice",
        "The same image must give the same logits, up to rounding. A model that draws random numbers hides behind one "
        "draw: average the gradient over many (expectation over transformation), and report the mean over draws.",
        {"largest_change": moved.max().item(), "answers_changed": turned.mean().item()},
        "largest_change",
        most=max(limits),
    )


def gradients(bench: Bench) -> dict[str, Any]:
    """Is there anything to follow?"""

    def look(trial: Trial) -> Tensor:
        _, gradient = value_and_gradient(trial.loss, trial.images.clone())
        flat = gradient.flatten(1).double()
        zero, finite = (flat == 0).all(1), flat.isfinite().all(1)
        return torch.stack([flat.nan_to_num(0, 0, 0).norm(dim=1), zero, ~finite, (flat == 0).double().mean(1)], 1)

    length, zero, broken, zeros = bench.each(look).unbind(1)
    numbers = {
        "median_norm": length.median().item(),
        "zero": zero.mean().item(),
        "not_finite": broken.mean().item(),
        "zero_entries": zeros.mean().item(),
        "unusable": (zero + broken).mean().item(),
    }
    why = (
        "Gradient of the loss at the clean images. An attack goes nowhere on a sample whose gradient is zero or not a "
        "number: a rounding or a threshold in front of the model cuts it off, logits that are too large let it "
        "underflow. Replace such a step by the identity in the backward pass, and attack a loss that no scale changes "
        "(DLR, a margin)."
    )
    return check("gradients", why, numbers, "unusable", most=TOLERANCE)


def loss_rises(bench: Bench) -> dict[str, Any]:
    """Does following it lead upwards?"""

    def rises(trial: Trial) -> Tensor:
        objective = trial.loss
        found = pgd(objective, trial.images, bench.ball, steps=PROBE_STEPS, noise=trial.noise)
        with torch.no_grad():
            return objective(found) > objective(trial.images)

    share = bench.each(rises).double().mean().item()
    why = f"{PROBE_STEPS} gradient steps must raise the loss. Where they do not, the gradient points nowhere."
    return check("loss rises", why, {"risen": share}, "risen", least=LOSS_RISES)


def more_steps(bench: Bench) -> list[dict[str, Any]]:
    """Robust accuracy against steps."""
    budgets = sorted({1, max(bench.steps // 4, 1), bench.steps, 2 * bench.steps})
    robust = [standing(bench.attacked(bench.ball, steps)) for steps in budgets]
    curve = {"steps": budgets, "robust": robust}
    stronger = check(
        "more steps help",
        "More steps can only help an attack that follows a gradient. Where one step fools more than many do, the "
        "gradient is good for nothing but its first step.",
        curve | {"largest_rise": _largest_rise(robust)},
        "largest_rise",
        most=TOLERANCE,
    )
    converged = check(
        "steps converged",
        "Twice the steps must find next to nothing new. Where they do, the reported robust accuracy is the budget's, not "
        "the model's: raise the steps.",
        curve | {"found_by_doubling": robust[-2] - robust[-1]},
        "found_by_doubling",
        most=TOLERANCE,
    )
    return [stronger, converged]


def radii(bench: Bench) -> list[dict[str, Any]]:
    """Robust accuracy against eps, and against noise."""
    # Half the pixel range: the grey image lies within it of every image, so that no model can tell them apart.
    pixels = max(trial.images[0].numel() for trial in bench.trials)
    largest = 0.5 if bench.norm == "linf" else 0.5 * math.sqrt(pixels)
    lengths = {eps for eps in bench.eps if 0 < eps < largest} | {largest}
    doubled = 2 * max(bench.eps)
    while doubled < largest:
        lengths.add(doubled)
        doubled *= 2
    balls = [make_ball(bench.norm, eps) for eps in sorted(lengths)]
    attack = [standing(bench.attacked(ball, bench.steps)) for ball in balls]
    noise = [standing(lost_to_noise(bench, ball)) for ball in balls]
    curve = {"eps": [round(ball.eps, 6) for ball in balls], "robust": attack}
    grey = check(
        "falls at a large radius",
        "At half the pixel range every image can be turned into the same grey one, which has one answer: robust accuracy "
        f"must fall to {bench.chance_is} or below. What stands there, stands because the attack fails."
        if bench.chance is not None
        else "No image has to make the model do what this attacker wants, whatever the radius.",
        curve | {"at_largest": attack[-1]} if bench.chance is not None else None,
        "at_largest",
        most=bench.chance if bench.chance is not None else 1,
    )
    larger = check(
        "larger radii help",
        "A larger ball holds every attack of a smaller one.",
        curve | {"largest_rise": _largest_rise(attack)},
        "largest_rise",
        most=TOLERANCE,
    )
    lead = check(
        "stronger than noise",
        f"The worst of {NOISE_DRAWS} random perturbations of the same radius must not fool as many as the attack, at "
        "every radius: an attack that leads nowhere over noise has no direction to go.",
        curve | {"robust_to_noise": noise, "lead": max(weak - strong for weak, strong in zip(noise, attack))},
        "lead",
        least=OVER_NOISE,
    )
    return [grey, larger, lead]


def lost_to_noise(bench: Bench, ball: Ball) -> Tensor:
    """Which samples fall to the worst of several random corners of a ball."""

    def worst(trial: Trial) -> Tensor:
        fooled = torch.zeros(len(trial.images), dtype=torch.bool, device=trial.images.device)
        for draw in range(NOISE_DRAWS):
            rows = (~fooled).nonzero().flatten()
            if len(rows) == 0:
                break
            left = trial.take(rows)
            direction = ball.ascend(torch.erfinv(left.noise.draw(left.images, _NOISE_RESTART + draw)))
            fooled[rows] = left.lost(ball.project(left.images + ball.eps * direction, left.images))
        return fooled

    return bench.each(worst)


def _largest_rise(values: list[float]) -> float:
    return max((later - earlier for earlier, later in pairwise(values)), default=0.0)
