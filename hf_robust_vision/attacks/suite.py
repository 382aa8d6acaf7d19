"""Named protocols: which attacks run, in which order, and the worst case over them per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .apgd import apgd
from .balls import Ball
from .noise import StartNoise
from .objectives import DLR, CrossEntropy, Logits, Misclassified, TargetedDLR
from .pgd import pgd


@dataclass(frozen=True)
class Attack:
    """One attack of a protocol.

    Args:
        name: What results call it.
        algorithm: "pgd" or "apgd".
        objective: "cross-entropy", "dlr" or "targeted-dlr".
        steps: Gradient steps per restart.
        restarts: Independent random starts.
        relative_step: Step size of "pgd" as a multiple of eps; None is its default. APGD chooses its own.
        targets: How many classes "targeted-dlr" aims at, from the strongest wrong class down.
    """

    name: str
    algorithm: str = "apgd"
    objective: str = "cross-entropy"
    steps: int = 100
    restarts: int = 1
    relative_step: float | None = None
    targets: int = 0

    def min_classes(self) -> int:
        """The fewest classes for which the objective is defined."""
        return {"cross-entropy": 2, "dlr": 3, "targeted-dlr": 4}[self.objective]


@dataclass(frozen=True)
class Protocol:
    """A named list of attacks; a sample is robust if none of them fools it.

    Args:
        name: How results and command lines call it.
        attacks: Run in order, each only on the samples that the ones before left unfooled.
    """

    name: str
    attacks: tuple[Attack, ...]

    def with_budget(self, steps: int | None = None, restarts: int | None = None) -> Protocol:
        """The same protocol with other steps or restarts for every attack."""
        return replace(
            self,
            attacks=tuple(
                replace(
                    attack,
                    steps=attack.steps if steps is None else steps,
                    restarts=attack.restarts if restarts is None else restarts,
                )
                for attack in self.attacks
            ),
        )

    def for_classes(self, classes: int) -> tuple[Protocol, list[str]]:
        """The part of the protocol that `classes` classes allow, and the names of the attacks left out."""
        if classes < 2:
            raise ValueError(f"a classification attack needs at least 2 classes, got {classes}.")
        kept = [attack for attack in self.attacks if attack.min_classes() <= classes]
        left_out = [attack.name for attack in self.attacks if attack.min_classes() > classes]
        fitted = tuple(replace(a, targets=min(a.targets, classes - 1)) if a.targets else a for a in kept)
        return replace(self, attacks=fitted), left_out

    def describe(self, ball: Ball, *, resolution: int, seed: int, dtype: torch.dtype) -> list[dict[str, Any]]:
        """The attacks as plain dictionaries, for a result."""
        shared = {"resolution": resolution, "seed": seed, "dtype": str(dtype).removeprefix("torch.")}
        rows = []
        for attack in self.attacks:
            row = asdict(attack)
            relative = row.pop("relative_step")
            row["step_size"] = "adaptive, first 2 * eps" if attack.algorithm == "apgd" else _size(attack, ball)
            row["target"] = f"{row.pop('targets')} strongest wrong classes" if attack.targets else None
            row.pop("targets", None)
            rows.append(row | shared | ({"relative_step": relative} if relative is not None else {}))
        return rows


_APGD_CE = Attack("apgd-ce", restarts=1)
_APGD_T = Attack("apgd-dlr-targeted", objective="targeted-dlr", restarts=1, targets=9)
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("quick", (Attack("pgd-10", "pgd", steps=10),)),
        Protocol("apgd-ce", (_APGD_CE,)),
        Protocol("robustvlm", (_APGD_CE, _APGD_T)),
    )
}


def get_protocol(name: str, *, steps: int | None = None, restarts: int | None = None) -> Protocol:
    """Look a protocol up by name.

    Raises:
        ValueError: If there is no protocol of that name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; choose one of {', '.join(map(repr, PROTOCOLS))}.")
    return PROTOCOLS[name].with_budget(steps, restarts)


@dataclass(frozen=True)
class Outcome:
    """What a protocol did to a batch.

    Args:
        images: Adversarial images in [0, 1]: a fooling one where there is one, else the last attack's best.
        fooled_by: The name of the attack that fooled each sample, or None.
    """

    images: Tensor
    fooled_by: list[str | None]


def run_protocol(
    protocol: Protocol,
    classify: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    noise: StartNoise,
) -> Outcome:
    """Attack a batch of rightly classified images with every attack of a protocol, worst case per sample.

    Args:
        protocol: The attacks; it must fit the number of classes (`Protocol.for_classes`).
        classify: Images in [0, 1] to logits, shape (batch, classes).
        images: Clean images in [0, 1].
        labels: True classes, shape (batch,).
        ball: Where the perturbation may go.
        noise: Owner of the random starts.
    """
    adversarial = images.clone()
    fooled_by: list[str | None] = [None] * len(images)
    for attack in protocol.attacks:
        rows = torch.tensor([i for i, name in enumerate(fooled_by) if name is None], dtype=torch.long)
        if len(rows) == 0 or ball.eps == 0:
            break
        rows = rows.to(images.device)
        logits = Logits(classify)
        found = _run_attack(attack, logits, images[rows], labels[rows], ball, noise.take(rows))
        adversarial[rows] = found
        with torch.no_grad():
            hits = Misclassified(classify, labels[rows])(found)
        for row in rows[hits].tolist():
            fooled_by[row] = attack.name
    return Outcome(adversarial, fooled_by)


def _run_attack(
    attack: Attack, logits: Logits, images: Tensor, labels: Tensor, ball: Ball, noise: StartNoise
) -> Tensor:
    fooled = Misclassified(logits, labels)
    if attack.objective == "targeted-dlr":
        return _targeted(attack, logits, images, labels, ball, noise)
    objective = CrossEntropy(logits, labels) if attack.objective == "cross-entropy" else DLR(logits, labels)
    if attack.algorithm == "apgd":
        return apgd(objective, images, ball, steps=attack.steps, noise=noise, restarts=attack.restarts, fooled=fooled)
    size = None if attack.relative_step is None else attack.relative_step * ball.eps
    return pgd(
        objective,
        images,
        ball,
        steps=attack.steps,
        step_size=size,
        noise=noise,
        restarts=attack.restarts,
        fooled=fooled,
    )


def _targeted(attack: Attack, logits: Logits, images: Tensor, labels: Tensor, ball: Ball, noise: StartNoise) -> Tensor:
    with torch.no_grad():
        ranking = logits(images).scatter(1, labels[:, None], -torch.inf).argsort(dim=1, descending=True)
    found = images.clone()
    rows = torch.arange(len(images), device=images.device)
    for rank in range(attack.targets):
        if len(rows) == 0:
            break
        objective = TargetedDLR(logits, labels[rows], ranking[rows, rank])
        fooled = Misclassified(logits, labels[rows])
        found[rows] = apgd(
            objective,
            images[rows],
            ball,
            steps=attack.steps,
            noise=noise.take(rows),
            restarts=attack.restarts,
            fooled=fooled,
        )
        with torch.no_grad():
            rows = rows[~Misclassified(logits, labels[rows])(found[rows])]
    return found


def _size(attack: Attack, ball: Ball) -> float:
    if attack.relative_step is not None:
        return attack.relative_step * ball.eps
    return min(2.5 / attack.steps, 1.25) * ball.eps
