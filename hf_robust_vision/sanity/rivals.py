"""Sanity checks against other attacks: what they fool, the measurement should have fooled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.attacks import Attack, Protocol, apgd, square
from hf_robust_vision.evaluation.task import Task

from .bench import TOLERANCE, Bench, Trial, check, standing


def another_loss(bench: Bench, attack: Attack | None, why: str) -> dict[str, Any]:
    """A loss that no scale changes, at the budget of the measurement; not run without an attack on one."""
    name, key = "as strong as another loss", "only_by_another_loss"
    if attack is None:
        return check(name, why, None, key, most=TOLERANCE)
    white, protocol = bench.white(), Protocol("another loss", (attack,))
    only = bench.each(lambda trial: trial.attack_with(protocol, bench.ball), ~white)
    return check(name, why, {"robust": standing(white), key: only.double().mean().item()}, key, most=TOLERANCE)


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


def transfer(bench: Bench, surrogate: Task | None) -> dict[str, Any]:
    """APGD on the same task of another model, the images carried over."""
    name = "as strong as a transfer"
    why = (
        "Images that fool another model fool this one by accident. What they fool, an attack on the model itself should "
        "have fooled."
    )
    if surrogate is None:
        why += " Pass surrogate=, such as the undefended model."
        return check(name, why, None, "only_by_transfer", most=TOLERANCE)

    def carry(trial: Trial) -> Tensor:
        with torch.no_grad():
            clean = surrogate.judge(replace(trial.batch, clean=()), trial.images)
        there = replace(trial, task=surrogate, batch=replace(trial.batch, clean=tuple(clean)))
        # To the highest loss, not to the first image that fools: what barely fools one model fools no other.
        return trial.lost(apgd(there.loss, trial.images, bench.ball, steps=bench.steps, noise=trial.noise))

    carried, white = bench.each(carry), bench.white()
    numbers = {
        "robust": standing(white),
        "robust_to_transfer": standing(carried),
        "only_by_transfer": (carried & ~white).double().mean().item(),
    }
    return check(name, why, numbers, "only_by_transfer", most=TOLERANCE)
