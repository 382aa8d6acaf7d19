"""What an attack is, for every task, and named protocols of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .apgd import apgd
from .balls import Ball, check_length
from .fab import fab
from .noise import StartNoise
from .objectives import DLR, CrossEntropy, ImagesToLogits, Margin, Objective, Success, TargetedDLR, TargetedMargin
from .pgd import default_step, pgd
from .search import check_count
from .square import square


# Of classification, with the fewest classes for which they are defined; other tasks have names of their own.
OBJECTIVES: dict[str, tuple[Callable[..., Objective], int]] = {
    "cross-entropy": (CrossEntropy, 2),
    "dlr": (DLR, 3),
    "margin": (Margin, 2),
    "targeted-dlr": (TargetedDLR, 4),
    "targeted-margin": (TargetedMargin, 2),
}
ALGORITHMS = {"pgd": "PGD", "apgd": "APGD", "fab": "FAB", "square": "Square, black box,"}
OWN_STEPS = {
    "apgd": "adaptive, first 2 * eps",
    "fab": "to the linearised boundary, times 1.05",
    "square": "squares of 0.8 of the image at first, down to one pixel",
}
STRONGEST = "strongest wrong classes"


@dataclass(frozen=True)
class Attack:
    """One attack, of whatever task.

    Args:
        name: What results call it.
        algorithm: "pgd", "apgd", "fab" or "square".
        objective: What it raises; the task knows what the name stands for, see `classification_objective`.
        steps: Gradient steps per restart and target; for "square" queries of the model per restart.
        restarts: Independent runs.
        step_size: Step of "pgd" in an Linf ball, in pixels of [0, 1], where a paper fixes it whatever eps is.
        relative_step: Its step in an L2 ball then, as a multiple of eps. Both are None for `default_step`.
        targets: How many classes a targeted objective aims at, from the strongest wrong class down.

    Raises:
        ValueError: If it can do nothing, or nothing that it says.
    """

    name: str
    algorithm: str = "apgd"
    objective: str = "cross-entropy"
    steps: int = 100
    restarts: int = 1
    step_size: float | None = None
    relative_step: float | None = None
    targets: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(_unknown(self, "algorithm", self.algorithm, ALGORITHMS))
        check_count(f"attack {self.name!r}: {'queries' if self.algorithm == 'square' else 'steps'}", self.steps)
        check_count(f"attack {self.name!r}: restarts", self.restarts)
        for size, norm in ((self.step_size, "linf"), (self.relative_step, "l2")):
            if (size is None) != (self.step_size is None) or (size is not None and self.algorithm != "pgd"):
                raise ValueError(
                    f"attack {self.name!r}: step_size is the step of pgd in an Linf ball and relative_step the one in an "
                    f"L2 ball: give both, to pgd, or neither; got {self.step_size} and {self.relative_step}."
                )
            if size is not None:
                check_length(f"attack {self.name!r}: step_size", size, norm, zero=False)

    def __str__(self) -> str:
        """One line for a person."""
        count = f"{self.steps} {'queries' if self.algorithm == 'square' else 'steps'}"
        aim = f" towards each of the {self.targets} {STRONGEST}" if self.targets > 1 else ""
        size = f" of {self.step_size * 255:g}/255" if self.step_size is not None else ""
        times = f", {self.restarts} restarts" if self.restarts > 1 else ""
        return f"{self.name}: {ALGORITHMS[self.algorithm]} on {self.objective}, {count}{size}{aim}{times}"

    def run(
        self, objective: Objective, images: Tensor, ball: Ball, noise: StartNoise, fooled: Success | None = None
    ) -> Tensor:
        """Adversarial images in [0, 1], as `pgd` gives them; `objective` is what `self.objective` stands for on these."""
        rest: dict[str, Any] = {"noise": noise, "restarts": self.restarts, "fooled": fooled}
        if self.algorithm == "square":
            return square(objective, images, ball, queries=self.steps, **rest)
        if self.algorithm == "pgd":
            return pgd(objective, images, ball, steps=self.steps, step_size=self._fixed_step(ball), **rest)
        return (fab if self.algorithm == "fab" else apgd)(objective, images, ball, steps=self.steps, **rest)

    def describe(
        self, ball: Ball, *, resolution: int | str, seed: int, dtype: torch.dtype | str, target: str | None = None
    ) -> dict[str, Any]:
        """The attack in `ball` as one row of `RobustnessResult.attacks`, in plain values.

        `target` says in words what it aims at, where that is not a number of wrong classes.
        """
        row = asdict(self)
        targets, relative = row.pop("targets"), row.pop("relative_step")
        row["step_size"] = OWN_STEPS.get(self.algorithm) or self._fixed_step(ball) or default_step(self.steps, ball)
        row["target"] = f"{targets} {STRONGEST}" if targets else target
        row |= {"resolution": resolution, "seed": seed, "dtype": str(dtype).removeprefix("torch.")}
        return row | ({"relative_step": relative} if relative is not None else {})

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Attack:
        """The attack that a row of `RobustnessResult.attacks` describes: in the ball of that result it does the same.

        Raises:
            ValueError: If a field is missing, or no attack has such a value.
        """
        try:
            name, objective, steps, restarts = (row[key] for key in ("name", "objective", "steps", "restarts"))
            targets = int(row["target"].split()[0]) if objective.startswith("targeted-") else 0
            # An L2 ball has no use for the fixed step: its row holds relative_step * eps, which may be over 1.
            relative = row.get("relative_step")
            fixed = min(row["step_size"], 1.0) if relative is not None else None
        except (KeyError, AttributeError, ValueError, TypeError) as error:
            raise ValueError(f"this row of attacks is not complete: {dict(row)} ({error!r}).") from error
        # Rows of retrieval had no algorithm once: it was always APGD.
        algorithm = row.get("algorithm", "apgd")
        return cls(name, algorithm, objective, steps, restarts, fixed, relative, targets)

    def _fixed_step(self, ball: Ball) -> float | None:
        return self.step_size if ball.norm == "linf" or self.relative_step is None else self.relative_step * ball.eps


@dataclass(frozen=True)
class Protocol:
    """A named list of attacks; a sample is robust if none of them fools it.

    Args:
        name: How results and command lines call it.
        attacks: Run in order, each only on the samples that the ones before left unfooled.
        carry: A sample that fell at a smaller radius has fallen at a larger one, and is not attacked again. False
            where the count after each attack is to be that attack's own at that radius.
    """

    name: str
    attacks: tuple[Attack, ...]
    carry: bool = True

    @classmethod
    def from_rows(cls, name: str, rows: Iterable[Mapping[str, Any]], carry: bool = True) -> Protocol:
        """The protocol that a result records in `attacks`, to repeat its measurement."""
        return cls(name, tuple(Attack.from_row(row) for row in rows), carry)

    def __str__(self) -> str:
        """What it is, a line an attack, for a person."""
        lines = [f"  {place}. {attack}" for place, attack in enumerate(self.attacks, start=1)]
        return "\n".join([f"{self.name}: worst case per sample; each attack meets what is still right", *lines])

    def with_budget(
        self, steps: int | None = None, restarts: int | None = None, queries: int | None = None
    ) -> Protocol:
        """The same protocol with another budget; attacks that become equal run once.

        `steps` are those of attacks that take gradients, `queries` of those that take none, `restarts` of all.

        Raises:
            ValueError: If a budget is none, or there is no attack that it could be of.
        """
        for name, budget, searches in (("steps", steps, False), ("queries", queries, True)):
            if budget is not None and not any((a.algorithm == "square") == searches for a in self.attacks):
                raise ValueError(
                    f"{name}={budget} changes nothing: protocol {self.name!r} has no attack that takes {name}."
                )
        return replace(
            self, attacks=tuple(dict.fromkeys(_budgeted(a, steps, restarts, queries) for a in self.attacks))
        )

    def for_classes(self, classes: int) -> tuple[Protocol, list[str]]:
        """The part of the protocol that `classes` classes allow, and the names of the attacks left out.

        Raises:
            ValueError: If there are fewer than 2 classes, an objective is none of classification, or no attack is left.
        """
        if classes < 2:
            raise ValueError(f"a classification attack needs at least 2 classes, got {classes}.")
        needs = {attack: _of_classes(attack)[1] for attack in self.attacks}
        kept = [attack for attack, need in needs.items() if need <= classes]
        left_out = [attack.name for attack, need in needs.items() if need > classes]
        if not kept:
            raise ValueError(f"no attack of protocol {self.name!r} can run with {classes} classes.")
        fitted = tuple(replace(a, targets=min(a.targets, classes - 1)) if a.targets else a for a in kept)
        return replace(self, attacks=fitted), left_out


def classification_objective(
    attack: Attack, logits: ImagesToLogits, labels: Tensor, targets: Tensor | None = None
) -> Objective:
    """What an attack on a classifier raises, by its name in `OBJECTIVES`.

    `targets`, shape (batch,), are the classes that the images are pushed towards, for a targeted objective.

    Raises:
        ValueError: If there is no such objective, or it is targeted without targets or the reverse.
    """
    make, _ = _of_classes(attack)
    if bool(attack.targets) != (targets is not None):
        raise ValueError(f"attack {attack.name!r}: {attack.objective} needs targets for each image, or takes none.")
    return make(logits, labels) if targets is None else make(logits, labels, targets)


def _of_classes(attack: Attack) -> tuple[Callable[..., Objective], int]:
    if attack.objective not in OBJECTIVES:
        raise ValueError(_unknown(attack, "objective", attack.objective, OBJECTIVES))
    targeted = attack.objective.startswith("targeted-")
    if targeted != bool(attack.targets) or (attack.algorithm == "fab" and not targeted):
        raise ValueError(
            f"attack {attack.name!r}: {attack.algorithm} on {attack.objective} with targets={attack.targets} can not "
            "run; fab needs a targeted objective, a targeted objective needs targets, and others have none."
        )
    return OBJECTIVES[attack.objective]


def _unknown(attack: Attack, kind: str, got: str, known: Iterable[str]) -> str:
    return f"attack {attack.name!r}: unknown {kind} {got!r}; choose one of {', '.join(known)}."


def _budgeted(attack: Attack, steps: int | None, restarts: int | None, queries: int | None) -> Attack:
    wanted = queries if attack.algorithm == "square" else steps
    changed = replace(
        attack,
        steps=attack.steps if wanted is None else wanted,
        restarts=attack.restarts if restarts is None else restarts,
    )
    return replace(changed, name=re.sub(r"(?<=^pgd-)\d+$", str(changed.steps), attack.name))


_APGD_CE = Attack("apgd-ce")
_APGD_T = Attack("apgd-dlr-targeted", objective="targeted-dlr", targets=9)
_FAB_T = Attack("fab-targeted", "fab", objective="targeted-margin", targets=9)
_SQUARE = Attack("square", "square", objective="margin", steps=5000)
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol("quick", (Attack("pgd-10", "pgd", steps=10),)),
        Protocol("apgd-ce", (_APGD_CE,)),
        # Its code leaves APGD-CE the five restarts of AutoAttack's constructor.
        Protocol("robustvlm", (replace(_APGD_CE, restarts=5), _APGD_T)),
        # The standard version of Croce and Hein 2020, https://huggingface.co/papers/2003.01690, from cheap to dear: each
        # attack meets what the ones before left, and Square is only needed where gradients mislead.
        Protocol("autoattack", (_APGD_CE, _APGD_T, _FAB_T, _SQUARE)),
        # One start and one step size, so PGD-10 is the beginning of PGD-20 and PGD-100, and what it fools they fool:
        # the count after each attack is that attack's own. TeCoA's step is 1/255; in an L2 ball that means nothing.
        # Deviation: any iterate that fools counts, not the last one only, which can miss it.
        Protocol(
            "tecoa",
            tuple(
                Attack(f"pgd-{steps}", "pgd", steps=steps, step_size=1 / 255, relative_step=0.25)
                for steps in (10, 20, 100)
            ),
            carry=False,
        ),
    )
}


def get_protocol(
    name: str, *, steps: int | None = None, restarts: int | None = None, queries: int | None = None
) -> Protocol:
    """Look a protocol up by name, with another budget if one is given (see `Protocol.with_budget`).

    Raises:
        ValueError: If there is no protocol of that name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; choose one of {', '.join(map(repr, PROTOCOLS))}.")
    return PROTOCOLS[name].with_budget(steps, restarts, queries)
