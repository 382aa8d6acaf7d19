"""Sanity checks against other attacks: what they fool, the measurement should have fooled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_robust_vision.attacks import Ball, Objective, apgd, square

from .bench import TOLERANCE, Bench, Trial, check, standing


@dataclass(frozen=True)
class OtherLoss:
    """An attack on a loss that the measurement may not have followed.

    Args:
        why: What it is and what to do where it wins; or why there is none.
        attack: Samples, ball and steps to one flag a sample; None where there is no such loss.
    """

    why: str
    attack: Callable[[Any, Ball, int], Tensor] | None = None


def another_loss(bench: Bench, other: OtherLoss) -> dict[str, Any]:
    """A loss that no scale changes, at the budget of the measurement."""
    name, key, attack = "as strong as another loss", "only_by_another_loss", other.attack
    if attack is None:
        return check(name, other.why, None, key, most=TOLERANCE)
    white = bench.white()
    only = bench.each(lambda trial: attack(trial, bench.ball, bench.steps), ~white)
    return check(name, other.why, {"robust": standing(white), key: only.double().mean().item()}, key, most=TOLERANCE)


def black_box(bench: Bench, queries: int) -> dict[str, Any]:
    """Square, which asks for scores only."""

    def search(trial: Trial) -> Tensor:
        found = square(trial.margin, trial.images, bench.ball, queries=queries, noise=trial.noise, fooled=trial.fooled)
        return trial.lost(found)

    white = bench.white()
    only = bench.each(search, ~white)
    return check(
        "as strong as a black box",
        "Square asks for logits only. What it fools, an attack that knows the whole model should have fooled. Where the "
        f"gradients are sound, the protocol is too weak for this model: {bench.stronger}.",
        {"robust": standing(white), "only_by_black_box": only.double().mean().item(), "queries": queries},
        "only_by_black_box",
        most=TOLERANCE,
    )


def transfer(bench: Bench, surrogate: Callable[[Any], Objective] | None) -> dict[str, Any]:
    """APGD on another model, the images carried over.

    Args:
        bench: The samples.
        surrogate: Samples to their loss on the other model; None where there is none.
    """
    name = "as strong as a transfer"
    why = (
        "Images that fool another model fool this one by accident. What they fool, an attack on the model itself should "
        "have fooled."
    )
    if surrogate is None:
        return check(
            name, f"{why} Pass surrogate=, such as the undefended model.", None, "only_by_transfer", most=TOLERANCE
        )

    def carry(trial: Trial) -> Tensor:
        # To the highest loss, not to the first image that fools: what barely fools one model fools no other.
        found = apgd(surrogate(trial), trial.images, bench.ball, steps=bench.steps, noise=trial.noise)
        return trial.lost(found)

    carried, white = bench.each(carry), bench.white()
    numbers = {
        "robust": standing(white),
        "robust_to_transfer": standing(carried),
        "only_by_transfer": (carried & ~white).double().mean().item(),
    }
    return check(name, why, numbers, "only_by_transfer", most=TOLERANCE)
