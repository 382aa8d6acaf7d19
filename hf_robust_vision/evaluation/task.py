"""What a task says to the engine: its samples, what the model answers, what an attacker wants, when a sample is lost.

A task is one file in `tasks/`. Loop, sharding, resume, worst case, saved images, sanity checks, report and card come
from the engine and from the rooms that read its results.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_robust_vision.attacks import Attack, Ball, Objective, Protocol, StartNoise, Success, make_ball
from hf_robust_vision.pixels import check_images
from hf_robust_vision.towers.base import weights_sha256

from .results import RobustnessResult, SampleRecord, eps_text, summarize_hits


SampleId = int | str


@dataclass(frozen=True)
class RobustnessProtocol:
    """How robustness is measured.

    Raises:
        ValueError: If there is no radius, one stands twice, or a value makes no sense.
    """

    protocol: Protocol
    # Radii, measured in rising order: a sample that falls at a radius has fallen at every larger one, since the smaller
    # ball lies inside; unless the protocol says `carry=False`.
    eps: tuple[float, ...]
    norm: str = "linf"  # or "l2"
    restarts: tuple[tuple[float, int], ...] = ()  # at single radii, where they differ from the protocol's own
    batch_size: int = 64  # images attacked at once; halved where they do not fit into memory
    seed: int = 0  # of the random starts

    def __post_init__(self) -> None:
        if not self.eps:
            raise ValueError("give at least one eps to measure at.")
        if len(set(self.eps)) < len(self.eps):
            raise ValueError(f"eps {sorted(self.eps)} holds a radius twice; name each once.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")
        for eps in self.eps:
            self.at(eps)

    def __str__(self) -> str:
        """For a person: the attacks, and the radii with their own restarts."""
        own = {eps: f" ({count} restarts)" for eps, count in self.restarts}
        radii = [f"{eps_text(eps, self.norm)}{own.get(eps, '')}" for eps in sorted(self.eps)]
        return f"{self.protocol}\n  {self.norm}, eps {', '.join(radii)}"

    def at(self, eps: float) -> tuple[Ball, Protocol]:
        """Ball and attacks of one radius."""
        return make_ball(self.norm, eps), self.protocol.with_budget(restarts=dict(self.restarts).get(eps))


@dataclass(frozen=True)
class Verdict:
    """What a model says about an image, and how far that brings an attacker."""

    answer: int | str  # a class, a rank, a text
    lost: bool  # the attacker has won
    harm: float  # how far the attacker got: of several images of one sample the one of the highest harm counts
    score: float | None = None  # what the record keeps beside the answer, if anything
    notes: Any = None  # what the task wants to know of the clean image when it is attacked


@dataclass(frozen=True)
class Batch:
    """Samples, by their places in the task's `ids`, with clean images of one size.

    `images` lie in [0, 1], shape (batch, 3, height, width); `clean` is empty while the model has not been asked.
    """

    places: tuple[int, ...]
    images: Tensor
    clean: tuple[Verdict, ...] = ()

    def take(self, rows: Tensor) -> Batch:
        """The batch of some of its rows."""
        chosen = rows.tolist()
        clean = tuple(self.clean[row] for row in chosen) if self.clean else ()
        return Batch(tuple(self.places[row] for row in chosen), self.images[rows], clean)


@dataclass(frozen=True)
class Stage:
    """One search of a level; `target` is the place among the strongest wrong classes, or among reference texts."""

    attack: Attack
    ball: Ball
    target: int = 0


@dataclass(frozen=True)
class Level:
    """A radius (or a severity) and the searches that a sample has to survive there, in order; none at radius 0."""

    value: float
    stages: tuple[Stage, ...]
    ball: Ball
    attacks: tuple[Attack, ...] = ()


class Task(ABC):
    """Base of all tasks: what the engine, the sanity checks and the readers of records ask."""

    kind: str  # of the files that hold its records
    task: str  # with `metric`, `group`, `dataset` and `split`: what results say
    metric: str = "accuracy"
    # An attack is recorded only where it does more harm than the clean image has, whose score the record keeps; by
    # default the first attack is recorded whatever it did.
    compares_with_clean: bool = False
    counts_survivors: bool = True  # results say what each attack leaves standing
    loss: str = ""  # objective that sanity checks follow with a gradient
    margin: str = "margin"  # and without one
    stronger: str = "raise steps and restarts"  # what to try where the attacks are too weak
    group: str = "all"
    model: nn.Module
    ids: Sequence[SampleId]
    dataset: str
    dataset_id: str | None = None  # of the Hub
    split: str

    @property
    def weight(self) -> Tensor:
        """A weight of the model: its device and dtype are those of the measurement."""
        return next(parameter for parameter in self.model.parameters() if parameter.is_floating_point())

    # What every task says

    @abstractmethod
    def load(self, place: int) -> Tensor:
        """The clean image of a sample in [0, 1], shape (3, height, width); called from several threads."""

    @abstractmethod
    def label(self, place: int) -> int | str:
        """The right answer, as the record holds it."""

    @abstractmethod
    def judge(self, batch: Batch, images: Tensor) -> list[Verdict]:
        """What the model says about `images`, which belong to the samples of the batch."""

    @abstractmethod
    def aim(self, stage: Stage, batch: Batch) -> tuple[Objective, Success | None]:
        """What an attack raises, and when it may stop."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values, beside weights, protocol and ids, that decide whether a record may be used again."""

    # What some tasks say

    def fit(self, how: RobustnessProtocol) -> tuple[RobustnessProtocol, list[str]]:
        """The part of a protocol that the task allows, and the names of the attacks left out."""
        return how, []

    def levels(self, how: RobustnessProtocol) -> list[Level]:
        """What a sample has to survive, in rising order."""
        levels = []
        for eps in sorted(how.eps):
            ball, protocol = how.at(eps)
            stages = [Stage(attack, ball, at) for attack in protocol.attacks for at in range(attack.targets or 1)]
            # In a ball of radius 0 lies the clean image only; the attacks are still named in the result.
            levels.append(Level(eps, tuple(stages) if eps > 0 else (), ball, protocol.attacks))
        return levels

    def stands(self, record: SampleRecord, stage: Stage) -> bool:
        """Whether a sample is still to be attacked."""
        return record.robust_hit

    def strike(self, stage: Stage, batch: Batch, seed: int) -> Tensor:
        """What a stage makes of the clean images of a batch."""
        objective, fooled = self.aim(stage, batch)
        return stage.attack.run(objective, batch.images, stage.ball, self.starts(stage, batch, seed), fooled)

    def starts(self, stage: Stage, batch: Batch, seed: int) -> StartNoise:
        """The random starts: each sample's own."""
        return StartNoise(seed, [self.ids[place] for place in batch.places])

    def first(self, place: int, clean: Verdict) -> SampleRecord:
        """The record of a sample before any attack."""
        lost, score = "clean" if clean.lost else None, clean.score if self.compares_with_clean else None
        return SampleRecord(self.ids[place], self.label(place), clean.answer, None, score, lost, score)

    def blame(self, stage: Stage, verdict: Verdict, record: SampleRecord) -> str | None:
        """The record's `fooled_by` once a stage has brought its sample to the worst verdict so far."""
        return record.fooled_by or (stage.attack.name if verdict.lost else None)

    def blames(self, levels: Sequence[Level]) -> set[str]:
        """All that `fooled_by` may say, beside "clean"."""
        return {stage.attack.name for level in levels for stage in level.stages}

    def rows(
        self, level: Level, records: Sequence[SampleRecord], smaller: Sequence[SampleRecord], seed: int
    ) -> list[dict[str, Any]]:
        """The attacks of a level for a result; `smaller` are the records below, where what fell there fell here."""
        dtype, size = self.weight.dtype, self.resolution
        rows = [
            attack.describe(level.ball, resolution=size, seed=seed, dtype=dtype, target=self.target_text(attack))
            for attack in level.attacks
        ]
        return after_each_attack(rows, records, smaller) if self.counts_survivors else rows

    def target_text(self, attack: Attack) -> str | None:
        """What an attack aims at, for a result, where that is not a number of wrong classes."""
        return None

    @property
    def resolution(self) -> int | str:
        """The size of the images under attack, for a result."""
        return max(self.load(0).shape[-2:])

    def fields(self, level: Level) -> dict[str, Any]:
        """What else the results of a level hold."""
        return {}

    @property
    def metrics(self) -> Sequence[str]:
        """What is measured, one result each at every level."""
        return (self.metric,)

    def summary(self, metric: str, records: Sequence[SampleRecord]) -> dict[str, Any]:
        """Accuracies and intervals over all samples of a level."""
        return summarize_hits(*zip(*(self.hits(record, metric) for record in records)))

    # What a record says without the model: the page and the card have only the files

    @classmethod
    def hits(cls, record: SampleRecord, metric: str) -> tuple[bool, bool]:
        """Is it right on the clean image, and under every attack?"""
        return record.clean_hit, record.robust_hit

    @classmethod
    def copies(cls, result: RobustnessResult) -> int:
        """How many records a sample of a result has."""
        return 1

    @classmethod
    def complaint(cls, record: SampleRecord, result: RobustnessResult) -> str:
        """What a record says that can not be; nothing where it may be."""
        return ""

    # What sanity checks ask

    def scores(self, batch: Batch, images: Tensor) -> Tensor:
        """The numbers that the answers are chosen by, shape (batch, ..., choices)."""
        raise NotImplementedError(f"{type(self).__name__} gives no scores to check.")

    def luck(self, places: Sequence[int]) -> tuple[float | None, str]:
        """Share of samples that may stand where all images are made equal, and what it is; None where there is none."""
        return None, ""

    def other_loss(self, steps: int) -> tuple[Attack | None, str]:
        """An attack on a loss that the measurement may not have followed, and what to do where it wins."""
        return None, "The attacks follow what the answer is decided by already: there is no other loss to try."


def one_size(loaded: Iterable[tuple[int, Tensor]], size: int, device: torch.device) -> Iterator[Batch]:
    """Samples with their images in batches of at most `size`, the images of each batch of one height and width."""
    # Images of two sizes can not be stacked, and padding would show the model other images.
    shapes: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for place, image in loaded:
        shapes.setdefault(image.shape, []).append((place, image))
    for alike in shapes.values():
        for start in range(0, len(alike), size):
            places, images = zip(*alike[start : start + size])
            yield Batch(places, check_images(torch.stack(images)).to(device))


def not_under(count: float, record: SampleRecord) -> str:
    """The complaint about a record whose answers are not all whole numbers under `count`."""
    answers = [record.label, record.clean, record.clean if record.adversarial is None else record.adversarial]
    if all(isinstance(answer, int) and 0 <= answer < count for answer in answers):
        return ""
    return f"sample {record.id!r} must hold whole numbers under {count}, got {answers}."


def after_each_attack(
    attacks: list[dict[str, Any]], records: Sequence[SampleRecord], smaller: Sequence[SampleRecord]
) -> list[dict[str, Any]]:
    """The attacks, each with the `robust_accuracy` that it and those before it leave."""
    # What fell at the radius below has fallen before the first attack here, whichever attack it was.
    carried = {record.id for record in smaller if not record.robust_hit}
    met = [record for record in records if record.fooled_by != "clean" and record.id not in carried]
    left = len(met)
    for attack in attacks:
        left -= sum(record.fooled_by == attack["name"] for record in met)
        attack["robust_accuracy"] = left / len(records)
    return attacks


def model_identity(model: nn.Module) -> dict[str, Any]:
    """What decides a model's answers: weights, config, and the modules themselves, which no config need describe."""
    # Two models of equal weights differ by what no weight holds: an activation, an epsilon, a hook's own module.
    config: Any = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    # Where a folder lies and which version wrote it decide nothing.
    kept = {key: value for key, value in values.items() if key[0] != "_" and key != "transformers_version"}
    modules = hashlib.sha256(repr(model).encode()).hexdigest()[:16]
    return {"weights": weights_sha256(model), "config": kept, "modules": modules}


def need_usable(model: nn.Module) -> None:
    """Refuse a model under which an attack would be weaker than it claims, or that is on no device."""
    # In float16 up to 15 % of the image gradients were measured to underflow to zero.
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            raise ValueError(
                f"{name} is on no device (offloaded?): load the whole model onto one device to attack it."
            )
        if parameter.dtype == torch.float16:
            raise ValueError(
                f"{name} is float16, in which image gradients underflow to zero and the attack is weaker than it "
                "claims: load the model with dtype=torch.bfloat16 or torch.float32."
            )
