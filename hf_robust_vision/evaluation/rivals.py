"""Sanity checks against other attacks: what they fool, the measurement should have fooled."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_robust_vision.attacks import Attack, CrossEntropy, Margin, Misclassified, Protocol, StartNoise, apgd, square
from hf_robust_vision.encoders import Encoder, attack_mode
from hf_robust_vision.text_bank import TextBank

from .bench import TOLERANCE, AttackedBench, check, classifier, standing


TARGETS = 3  # strongest wrong classes that the other loss aims at


def another_loss(attacked: AttackedBench, classes: int) -> dict[str, Any]:
    """A targeted margin at the budget of the measurement."""
    targets = min(TARGETS, classes - 1)
    attack = Attack("apgd", objective="targeted-margin", targets=targets, steps=attacked.steps)
    white = attacked(attacked.ball, attacked.steps)
    only = attacked.bench.attacked(Protocol("another loss", (attack,)), attacked.ball, (~white).nonzero().flatten())
    return check(
        "as strong as another loss",
        f"APGD on the margin to each of the {targets} strongest wrong classes, which no scale of the logits changes, must "
        "find next to nothing that the protocol missed. Where it does, the protocol follows the wrong loss for this "
        "model: take 'robustvlm' or 'autoattack'.",
        {"robust": standing(white), "only_by_another_loss": only.double().mean().item()},
        "only_by_another_loss",
        most=TOLERANCE,
    )


def black_box(attacked: AttackedBench, queries: int) -> dict[str, Any]:
    """Square, which asks for logits only."""
    bench, ball = attacked.bench, attacked.ball

    def search(images: Tensor, labels: Tensor, noise: StartNoise) -> Tensor:
        fooled = Misclassified(bench.classify, labels)
        objective = Margin(bench.classify, labels)
        found = square(objective, images, ball, queries=queries, noise=noise, fooled=fooled)
        return bench.fooled(found, labels)

    white = attacked(ball, attacked.steps)
    only = bench.each(search, (~white).nonzero().flatten())
    return check(
        "as strong as a black box",
        "Square asks for logits only. What it fools, an attack that knows the whole model should have fooled. Where the "
        "gradients are sound, the protocol is too weak for this model: take 'robustvlm' or 'autoattack'.",
        {"robust": standing(white), "only_by_black_box": only.double().mean().item(), "queries": queries},
        "only_by_black_box",
        most=TOLERANCE,
    )


def transfer(attacked: AttackedBench, surrogate: Encoder | None, bank: TextBank) -> dict[str, Any]:
    """APGD on another model, the images carried over."""
    name = "as strong as a transfer"
    why = (
        "Images that fool another model fool this one by accident. What they fool, an attack on the model itself should "
        "have fooled."
    )
    if surrogate is None:
        return check(
            name, f"{why} Pass surrogate=, such as the undefended model.", None, "only_by_transfer", most=TOLERANCE
        )
    bench, ball = attacked.bench, attacked.ball
    classify = classifier(surrogate, bank)

    def carry(images: Tensor, labels: Tensor, noise: StartNoise) -> Tensor:
        # To the highest loss, not to the first image that fools: what barely fools one model fools no other.
        found = apgd(CrossEntropy(classify, labels), images, ball, steps=attacked.steps, noise=noise)
        return bench.fooled(found, labels)

    with attack_mode(surrogate):
        carried = bench.each(carry)
    white = attacked(ball, attacked.steps)
    numbers = {
        "robust": standing(white),
        "robust_to_transfer": standing(carried),
        "only_by_transfer": (carried & ~white).double().mean().item(),
    }
    return check(name, why, numbers, "only_by_transfer", most=TOLERANCE)
