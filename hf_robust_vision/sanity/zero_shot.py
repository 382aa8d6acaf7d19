"""Sanity checks of a zero-shot classification, and what is said about those of any task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.attacks import (
    Attack,
    Ball,
    CrossEntropy,
    Logits,
    Margin,
    Misclassified,
    Objective,
    Protocol,
    StartNoise,
    run_protocol,
)
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.evaluation.tasks.zero_shot import RobustnessProtocol, classifier
from hf_robust_vision.pixels import check_images
from hf_robust_vision.towers.clip import Encoder, attack_mode
from hf_robust_vision.towers.text_bank import TextBank

from .bench import Bench, Trial
from .checks import not_run, run_checks
from .rivals import OtherLoss


TARGETS = 3  # strongest wrong classes that the other loss aims at


@dataclass(frozen=True)
class ClassifiedImages(Trial):
    """Rightly classified images.

    Args:
        classify: Images to logits, shape (batch, classes).
        labels: True classes, shape (batch,).
        white: The attacks that follow a gradient.
    """

    classify: Callable[[Tensor], Tensor]
    labels: Tensor
    white: Protocol

    @property
    def loss(self) -> Objective:
        """Cross-entropy."""
        return CrossEntropy(self.classify, self.labels)

    @property
    def margin(self) -> Objective:
        """Highest wrong logit minus the true one."""
        return Margin(self.classify, self.labels)

    @property
    def fooled(self) -> Misclassified:
        """The highest logit is a wrong one."""
        return Misclassified(self.classify, self.labels)

    def scores(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.classify(images)

    def attack(self, ball: Ball, steps: int) -> Tensor:
        """The worst case over the protocol."""
        return self.attack_with(self.white.with_budget(steps=steps), ball)

    def attack_with(self, protocol: Protocol, ball: Ball) -> Tensor:
        """Which samples a protocol fools."""
        outcome = run_protocol(protocol, self.classify, self.images, self.labels, ball, self.noise)
        return torch.tensor([name is not None for name in outcome.fooled_by])

    def take(self, rows: Tensor) -> ClassifiedImages:
        """See `Trial.take`."""
        return replace(self, images=self.images[rows], noise=self.noise.take(rows), labels=self.labels[rows])


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
    classes = len(bank.class_names)
    protocol, _ = how.protocol.for_classes(classes)
    white = replace(protocol, attacks=tuple(a for a in protocol.attacks if a.algorithm != "square"))
    if not white.attacks or max(how.eps) == 0:
        raise ValueError(
            f"nothing to check: protocol {protocol.name!r} at eps {list(how.eps)} follows no gradient. Choose one with a "
            "gradient attack, such as 'apgd-ce', and an eps above 0."
        )
    device = torch.device(device) if device is not None else encoder.visual_projection.weight.device
    other = Logits(classifier(surrogate, surrogate_bank or bank)) if surrogate is not None else None
    with attack_mode(encoder), attack_mode(surrogate) if surrogate is not None else nullcontext():
        trials = _pick(Logits(classifier(encoder, bank)), white, dataset, how, samples, device)
        labels = torch.cat([trial.labels for trial in trials])
        bench = Bench(
            trials,
            how.norm,
            how.eps,
            steps=max(attack.steps for attack in white.attacks),
            chance=max(labels.bincount().max().item() / len(labels), 1 / classes),
            chance_is="the share of the commonest class",
            stronger="take 'robustvlm' or 'autoattack'",
        )
        return run_checks(
            bench,
            other=_targeted_margin(classes),
            queries=queries,
            surrogate=None if other is None else lambda trial: CrossEntropy(other, trial.labels),
            metric="accuracy",
            protocol=protocol.name,
            seed=how.seed,
        )


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
            sanity = not_run(error)
        for result in results:
            if result.model == name:
                result.sanity = sanity


def sanity_text(results: Sequence[RobustnessResult]) -> str:
    """A line for each model, dataset, group and metric whose results were checked."""
    found = {}
    for result in results:
        if result.sanity is not None:
            metric = "" if result.metric == "accuracy" else f", {result.metric.replace('_', ' ')}"
            group = "" if result.group == "all" else f", {result.group}"
            found[f"{result.model} on {result.dataset}{group}{metric}"] = result.sanity
    return "\n".join(
        f"sanity checks, {what}: {sanity.get('why') or ', '.join(sanity['flagged']) or 'all passed'}"
        for what, sanity in found.items()
    )


def _pick(
    classify: Callable[[Tensor], Tensor],
    white: Protocol,
    dataset: LabelledImages,
    how: RobustnessProtocol,
    samples: int,
    device: torch.device,
) -> list[ClassifiedImages]:
    """The first rightly classified images in a seeded order."""
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
    noise = StartNoise(how.seed, ids[:samples])
    whole = ClassifiedImages(torch.cat(images)[:samples], noise, classify, torch.cat(labels)[:samples], white)
    return [whole.take(rows) for rows in torch.arange(len(noise.ids), device=device).split(how.batch_size)]


def _targeted_margin(classes: int) -> OtherLoss:
    targets = min(TARGETS, classes - 1)

    def attack(trial: ClassifiedImages, ball: Ball, steps: int) -> Tensor:
        towards = Attack("apgd", objective="targeted-margin", targets=targets, steps=steps)
        return trial.attack_with(Protocol("another loss", (towards,)), ball)

    return OtherLoss(
        f"APGD on the margin to each of the {targets} strongest wrong classes, which no scale of the logits changes, must "
        "find next to nothing that the protocol missed. Where it does, the protocol follows the wrong loss for this "
        "model: take 'robustvlm' or 'autoattack'.",
        attack,
    )
