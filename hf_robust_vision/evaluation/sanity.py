"""Checks against gradient masking: what a robust accuracy must show before it is believed.

A model whose gradients say nothing looks robust to every attack that follows them. Each check here is something that
an attack which works can not fail, after Athalye et al. 2018 (https://huggingface.co/papers/1802.00420) and Carlini et
al. 2019 (https://huggingface.co/papers/1902.06705). A model that passes them all is not proven robust; one that fails
one is measured wrongly until somebody finds out why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.attacks import Ball, CrossEntropy, StartNoise, make_ball, pgd
from hf_robust_vision.attacks.pgd import value_and_gradient
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.encoders import Encoder, attack_mode
from hf_robust_vision.text_bank import TextBank

from .bench import TOLERANCE, AttackedBench, Bench, check, pick_bench, standing
from .results import RobustnessResult
from .rivals import another_loss, black_box, transfer
from .zero_shot import RobustnessProtocol


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


def check_sanity(
    encoder: Encoder,
    bank: TextBank,
    dataset: LabelledImages,
    how: RobustnessProtocol,
    *,
    surrogate: Encoder | None = None,
    surrogate_bank: TextBank | None = None,
    samples: int = 100,
    queries: int = 1000,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Look for signs that a measurement flatters its model, and give what `RobustnessResult.sanity` holds.

    The checks look at the first `samples` images, in a seeded order, that the model classifies rightly. Attacks run
    at the largest radius of `how` unless a check says otherwise; those of its protocol that ask for no gradient are
    left to the black-box check. It runs whole in the process that calls it.

    Args:
        encoder: The model that was measured; a defence overrides its `encode_images`.
        bank: Its zero-shot classifier.
        dataset: What it was measured on.
        how: How it was measured.
        surrogate: Another model for images of the same size, from which attacks are carried over: the undefended
            model is a good one. Without it that check is not run.
        surrogate_bank: Its classifier; by default the same `bank`.
        samples: Images to look at.
        queries: Looks at the model of the black-box attack per image.
        device: Where to run; by default where the encoder is.

    Returns:
        Plain values for JSON: `verdict` ("passed", or "flagged" if one check was), `flagged` (their names), `checks`
        (each with `name`, `verdict` ("passed", "flagged", "not run"), `numbers`, `threshold` and `why`), and what was
        looked at. Shares are over the samples, in [0, 1].

    Raises:
        ValueError: If the classes of dataset and bank differ, the protocol has no gradient attack or no radius above
            0, or the model is right about no image.
    """
    bank.need_classes(dataset.class_names)
    protocol, _ = how.protocol.for_classes(len(bank.class_names))
    white = replace(protocol, attacks=tuple(a for a in protocol.attacks if a.algorithm != "square"))
    if not white.attacks or max(how.eps) == 0:
        raise ValueError(
            f"nothing to check: protocol {protocol.name!r} at eps {list(how.eps)} follows no gradient. Choose one with a "
            "gradient attack, such as 'apgd-ce', and an eps above 0."
        )
    device = torch.device(device) if device is not None else encoder.visual_projection.weight.device
    with attack_mode(encoder):
        bench = pick_bench(encoder, bank, dataset, how, samples, device)
        attacked = AttackedBench(bench, white, how)
        checks = [
            _same_answer(bench),
            _gradients(bench),
            _loss_rises(bench, attacked.ball),
            *_steps(attacked),
            *_radii(attacked, dataset),
            another_loss(attacked, len(bank.class_names)),
            black_box(attacked, queries),
            transfer(attacked, surrogate, surrogate_bank or bank),
        ]
    flagged = [check["name"] for check in checks if check["verdict"] == "flagged"]
    return {
        "verdict": "flagged" if flagged else "passed",
        "flagged": flagged,
        "checks": checks,
        "num_samples": len(bench.labels),
        "protocol": protocol.name,
        "steps": attacked.steps,
        "norm": how.norm,
        "eps": attacked.ball.eps,
        "seed": how.seed,
    }


def add_sanity(
    results: Sequence[RobustnessResult],
    models: Mapping[str, tuple[Encoder, TextBank]],
    dataset: LabelledImages,
    how: RobustnessProtocol,
    **settings: Any,
) -> None:
    """Fill `sanity` of results, each model checked with another one, if there is one, as its surrogate.

    Args:
        results: Of these models on this dataset. Where nothing can be checked they say why, and stand.
        models: Encoder and classifier by the `model` of the results, on one device; others serve as surrogates only.
        dataset: What was measured on.
        how: How it was measured.
        settings: Passed on to `check_sanity`.
    """
    for name in dict.fromkeys(result.model for result in results):
        encoder, bank = models[name]
        surrogate, other = next((pair for key, pair in models.items() if key != name), (None, None))
        try:
            sanity = check_sanity(encoder, bank, dataset, how, surrogate=surrogate, surrogate_bank=other, **settings)
        except ValueError as error:
            sanity = {"verdict": "not run", "flagged": [], "checks": [], "why": str(error)}
        for result in results:
            if result.model == name:
                result.sanity = sanity


def sanity_text(results: Sequence[RobustnessResult]) -> str:
    """A line for each model and dataset whose results were checked."""
    found = {(result.model, result.dataset): result.sanity for result in results if result.sanity is not None}
    return "\n".join(
        f"sanity checks, {model} on {dataset}: {sanity.get('why') or ', '.join(sanity['flagged']) or 'all passed'}"
        for (model, dataset), sanity in found.items()
    )


def _same_answer(bench: Bench) -> dict[str, Any]:
    def change(images: Tensor, labels: Tensor, noise: StartNoise) -> Tensor:
        with torch.no_grad():
            first, *others = (bench.classify(images) for _ in range(PASSES))
        spread = (first.amax(1) - first.amin(1)).clamp_min(torch.finfo(first.dtype).tiny)
        moved = torch.stack([(other - first).abs().amax(1) for other in others]).amax(0) / spread
        turned = torch.stack([other.argmax(1) != first.argmax(1) for other in others]).any(0)
        return torch.stack([moved, turned], 1).double()

    moved, turned = bench.each(change).unbind(1)
    with torch.no_grad():
        precision = torch.finfo(bench.classify(bench.images[:1]).dtype).eps
    return check(
        "same answer twice",
        "The same image must give the same logits, up to rounding. A model that draws random numbers hides behind one "
        "draw: average the gradient over many (expectation over transformation), and report the mean over draws.",
        {"largest_change": moved.max().item(), "answers_changed": turned.mean().item()},
        "largest_change",
        most=max(SAME_ANSWER, precision),
    )


def _gradients(bench: Bench) -> dict[str, Any]:
    def look(images: Tensor, labels: Tensor, noise: StartNoise) -> Tensor:
        _, gradient = value_and_gradient(CrossEntropy(bench.classify, labels), images.clone())
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
        "Gradient of the cross-entropy at the clean images. An attack goes nowhere on a sample whose gradient is zero "
        "or not a number: a rounding or a threshold in front of the model cuts it off, logits that are too large let it "
        "underflow. Replace such a step by the identity in the backward pass, and attack a loss that no scale changes "
        "(DLR)."
    )
    return check("gradients", why, numbers, "unusable", most=TOLERANCE)


def _loss_rises(bench: Bench, ball: Ball) -> dict[str, Any]:
    def rises(images: Tensor, labels: Tensor, noise: StartNoise) -> Tensor:
        objective = CrossEntropy(bench.classify, labels)
        found = pgd(objective, images, ball, steps=PROBE_STEPS, noise=noise)
        with torch.no_grad():
            return objective(found) > objective(images)

    share = bench.each(rises).double().mean().item()
    why = f"{PROBE_STEPS} gradient steps must raise the cross-entropy. Where they do not, the gradient points nowhere."
    return check("loss rises", why, {"risen": share}, "risen", least=LOSS_RISES)


def _steps(attacked: AttackedBench) -> list[dict[str, Any]]:
    budgets = sorted({1, max(attacked.steps // 4, 1), attacked.steps, 2 * attacked.steps})
    robust = [standing(attacked(attacked.ball, steps)) for steps in budgets]
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


def _radii(attacked: AttackedBench, dataset: LabelledImages) -> list[dict[str, Any]]:
    bench = attacked.bench
    # Half the pixel range: the grey image lies within it of every image, so that no classifier can tell them apart.
    largest = 0.5 if attacked.how.norm == "linf" else 0.5 * math.sqrt(bench.images[0].numel())
    radii = {eps for eps in attacked.how.eps if 0 < eps < largest} | {largest}
    doubled = 2 * max(attacked.how.eps)
    while doubled < largest:
        radii.add(doubled)
        doubled *= 2
    balls = [make_ball(attacked.how.norm, eps) for eps in sorted(radii)]
    attack = [standing(attacked(ball, attacked.steps)) for ball in balls]
    noise = [standing(_lost_to_noise(bench, ball)) for ball in balls]
    curve = {"eps": [round(ball.eps, 6) for ball in balls], "robust": attack}
    commonest = bench.labels.bincount().max().item() / len(bench.labels)
    chance = max(commonest, 1 / len(dataset.class_names))
    grey = check(
        "falls at a large radius",
        "At half the pixel range every image can be turned into the same grey one, which has one answer: robust accuracy "
        "must fall to the share of the commonest class or below. What stands there, stands because the attack fails.",
        curve | {"at_largest": attack[-1]},
        "at_largest",
        most=chance,
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


def _lost_to_noise(bench: Bench, ball: Ball) -> Tensor:
    def worst(images: Tensor, labels: Tensor, noise: StartNoise) -> Tensor:
        fooled = torch.zeros_like(labels, dtype=torch.bool)
        for draw in range(NOISE_DRAWS):
            direction = ball.ascend(noise.draw(images, _NOISE_RESTART + draw))
            fooled |= bench.fooled(ball.project(images + ball.eps * direction, images), labels)
        return fooled

    return bench.each(worst)


def _largest_rise(values: list[float]) -> float:
    return max((later - earlier for earlier, later in pairwise(values)), default=0.0)
