"""What sanity checks have in common: the samples, the attacks on them that several checks share, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.attacks import Ball, Misclassified, Protocol, StartNoise, make_ball, run_protocol
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.encoders import Encoder, image_embedder
from hf_robust_vision.pixels import check_images
from hf_robust_vision.text_bank import TextBank

from .zero_shot import RobustnessProtocol


# Set, like the thresholds of `sanity`, before any model was looked at.
# Share of the samples by which a comparison may come out on the wrong side. Of 100 samples five turn on luck; a model
# that masks its gradients loses tens of points.
TOLERANCE = 0.05


@dataclass(frozen=True)
class Bench:
    """The samples, all classified rightly, and the model that does it.

    Args:
        classify: Images in [0, 1] to logits, shape (batch, classes).
        images: In [0, 1], shape (samples, 3, height, width).
        labels: Shape (samples,).
        noise: One id a sample.
        batch_size: Images that go through the model at once.
    """

    classify: Callable[[Tensor], Tensor]
    images: Tensor
    labels: Tensor
    noise: StartNoise
    batch_size: int

    def each(self, function: Callable[[Tensor, Tensor, StartNoise], Tensor], rows: Tensor | None = None) -> Tensor:
        """What a function of images, labels and noise gives for each sample; False for those not in `rows`."""
        rows = torch.arange(len(self.labels)) if rows is None else rows
        if len(rows) == 0:
            return torch.zeros(len(self.labels), dtype=torch.bool)
        parts = []
        for part in rows.split(self.batch_size):
            place = part.to(self.images.device)
            parts.append(function(self.images[place], self.labels[place], self.noise.take(part)).cpu())
        values = torch.cat(parts)
        whole = values.new_zeros(len(self.labels), *values.shape[1:])
        whole[rows] = values
        return whole

    def attacked(self, protocol: Protocol, ball: Ball, rows: Tensor | None = None) -> Tensor:
        """Which samples a protocol fools; False for those not in `rows`."""

        def run(images: Tensor, labels: Tensor, noise: StartNoise) -> Tensor:
            outcome = run_protocol(protocol, self.classify, images, labels, ball, noise)
            return torch.tensor([name is not None for name in outcome.fooled_by])

        return self.each(run, rows)

    def fooled(self, images: Tensor, labels: Tensor) -> Tensor:
        """One flag an image."""
        with torch.no_grad():
            return Misclassified(self.classify, labels)(images)


@dataclass(frozen=True)
class AttackedBench:
    """Which samples the gradient attacks fool at any budget and radius that a check asks for; each is run once.

    Args:
        bench: The samples.
        white: The attacks of the protocol that follow a gradient.
        how: The measurement that is checked.
    """

    bench: Bench
    white: Protocol
    how: RobustnessProtocol
    _flags: dict[tuple[float, int], Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Of the measurement."""
        return max(attack.steps for attack in self.white.attacks)

    @property
    def ball(self) -> Ball:
        """Of the largest radius of the measurement."""
        return make_ball(self.how.norm, max(self.how.eps))

    def __call__(self, ball: Ball, steps: int) -> Tensor:
        """Which samples fall, independent of every other radius and budget."""
        if (ball.eps, steps) not in self._flags:
            self._flags[ball.eps, steps] = self.bench.attacked(self.white.with_budget(steps=steps), ball)
        return self._flags[ball.eps, steps]


def classifier(encoder: Encoder, bank: TextBank) -> Callable[[Tensor], Tensor]:
    """Images in [0, 1] of any size to logits; they are fitted to the tower inside."""
    embed = image_embedder(encoder)
    return bank.classify(lambda images: embed(encoder.transform.fit(images)))


def pick_bench(
    encoder: Encoder,
    bank: TextBank,
    dataset: LabelledImages,
    how: RobustnessProtocol,
    samples: int,
    device: torch.device,
) -> Bench:
    """The first rightly classified images in a seeded order."""
    classify = classifier(encoder, bank)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(how.seed)).tolist()
    images, labels, ids = [], [], []
    for start in range(0, len(order), how.batch_size):
        batch = collate_images([dataset[index] for index in order[start : start + how.batch_size]])
        raw, truth = check_images(batch["images"]).to(device), batch["labels"].to(device)
        with torch.no_grad():
            right = (classify(raw).argmax(1) == truth).nonzero().flatten()
        images.append(raw[right])
        labels.append(truth[right])
        ids += [batch["ids"].tolist()[row] for row in right.tolist()]
        if len(ids) >= samples:
            break
    if not ids:
        raise ValueError(f"the model is right about none of {len(dataset)} images: there is nothing to attack.")
    picked = torch.cat(images)[:samples], torch.cat(labels)[:samples]
    return Bench(classify, *picked, StartNoise(how.seed, ids[:samples]), how.batch_size)


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
