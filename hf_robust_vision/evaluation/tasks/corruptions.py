"""Zero-shot classification of corrupted images. No attacker is at work here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from hf_robust_vision.attacks import Attack, Objective, Protocol, Success, make_ball
from hf_robust_vision.data.corruptions import (
    EXTRA_FAMILIES,
    FAMILIES,
    LIBRARY,
    SEVERITIES,
    check_choice,
    corrupt,
    library,
)
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.evaluation.engine import RunSettings, evaluate
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, versions, wilson_interval
from hf_robust_vision.evaluation.task import Batch, Level, RobustnessProtocol, Stage, Verdict, not_under
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.towers.text_bank import TextBank

from .zero_shot import ZeroShot


PROTOCOL = "imagenet-c"


@dataclass
class Corruptions(ZeroShot):
    """Is the image still taken for its class when it is corrupted?

    A sample is one image under one family, its id "family/sample"; the levels are the severities. `robust_accuracy` is
    the mean over the families, `attacks` has a row with the accuracy of each. It is accuracy, not the benchmark's mCE,
    which is relative to AlexNet's errors on ImageNet.

    Deviation: ImageNet-C corrupts crops of 224 pixels and stores them as JPEG. Here an image is corrupted at the size
    that the dataset gives it, which the rows call `resolution`, and not compressed. The strengths were chosen for 224
    pixels: the same blur takes more from a smaller image.

    Raises:
        ModuleNotFoundError: If the library is not installed; the message is the line to type.
        ValueError: If a family or severity is unknown, or the class names of dataset and bank differ.
    """

    families: Sequence[str] = tuple(FAMILIES)
    severities: Sequence[int] = SEVERITIES
    seed: int = 0
    kind = PROTOCOL
    task = "corruption"
    metric = "mean corruption accuracy"

    def __post_init__(self) -> None:
        check_choice(self.families, self.severities)
        super().__post_init__()
        self.families = tuple(dict.fromkeys(self.families))
        self.ids = [f"{family}/{sample}" for family in self.families for sample in self.images.ids]
        self.labels = self.labels * len(self.families)

    def load(self, place: int) -> Tensor:
        """The image, not yet corrupted."""
        return super().load(place % len(self.images))

    @override
    def fit(self, how: RobustnessProtocol) -> tuple[RobustnessProtocol, list[str]]:
        return how, []

    @override
    def aim(self, stage: Stage, batch: Batch) -> tuple[Objective, Success]:
        raise ValueError("corruptions are not searched for: there is nothing that an attack could follow.")

    @override
    def levels(self, how: RobustnessProtocol) -> list[Level]:
        severe = [(float(severity), Attack(PROTOCOL, steps=severity)) for severity in sorted(set(self.severities))]
        ball = make_ball("linf", 1)
        return [Level(value, (Stage(attack, ball, int(value)),), ball) for value, attack in severe]

    @override
    def strike(self, stage: Stage, batch: Batch, seed: int) -> Tensor:
        corrupted = []
        for place, image in zip(batch.places, batch.images):
            family, _, sample = str(self.ids[place]).partition("/")
            corrupted.append(corrupt(image, family, stage.target, seed=self.seed, sample=sample))
        return torch.stack(corrupted)

    def stands(self, record: SampleRecord, stage: Stage) -> bool:
        """All are corrupted: a hit on the corrupted image is a hit, whatever the clean one was taken for."""
        return True

    def first(self, place: int, clean: Verdict) -> SampleRecord:
        """Before its severity there is nothing to blame."""
        return SampleRecord(self.ids[place], self.label(place), clean.answer)

    def blame(self, stage: Stage, verdict: Verdict, record: SampleRecord) -> str | None:
        """The clean image, if that was wrong already, or the family."""
        if not verdict.lost:
            return None
        return "clean" if record.clean != record.label else str(record.id).partition("/")[0]

    @override
    def blames(self, levels: Sequence[Level]) -> set[str]:
        return set(self.families)

    @override
    def rows(
        self, level: Level, records: Sequence[SampleRecord], smaller: Sequence[SampleRecord], seed: int
    ) -> list[dict[str, Any]]:
        count, rows = len(self.images), []
        about: dict[str, Any] = {"resolution": self.resolution, "seed": self.seed, "severity": int(level.value)}
        about["dtype"] = str(self.weight.dtype).removeprefix("torch.")
        for place, family in enumerate(self.families):
            hits = sum(record.robust_hit for record in records[place * count : (place + 1) * count])
            found = {"accuracy": hits / count, "ci95": list(wilson_interval(hits, count))}
            rows.append({"name": family} | about | found)
        return rows

    @override
    def identity(self) -> dict[str, Any]:
        own = {"corruptions": [self.families, sorted(self.severities), self.seed], "library": version(LIBRARY)}
        return super().identity() | own

    def fields(self, level: Level) -> dict[str, Any]:
        """The severity, the classifier, and the families of ImageNet-C that were not measured."""
        own: dict[str, Any] = {"norm": "none", "eps": 0.0, "severity": int(level.value)}
        own["left_out"] = [name for name in (*FAMILIES, *EXTRA_FAMILIES) if name not in self.families]
        own["versions"] = versions() | {LIBRARY: version(LIBRARY)}
        return super().fields(level) | own

    @override
    def summary(self, metric: str, records: Sequence[SampleRecord]) -> dict[str, Any]:
        found = super().summary(metric, records) | {"num_samples": (count := len(self.images))}
        # The families share their images: as wide as if all families agreed on each, so never too narrow.
        bounds = {name: list(wilson_interval(found[name] * count, count)) for name in found["ci95"]}
        return found | {"ci95": bounds}

    @classmethod
    def hits(cls, record: SampleRecord, metric: str) -> tuple[bool, bool]:
        """A hit on the corrupted image is a hit, whatever the clean one was taken for."""
        return record.clean == record.label, record.robust_hit

    @classmethod
    @override
    def copies(cls, result: RobustnessResult) -> int:
        return len(result.attacks)

    @classmethod
    @override
    def complaint(cls, record: SampleRecord, result: RobustnessResult) -> str:
        return not_under(len(result.class_names), record)


class CorruptionSettings(RunSettings, total=False):
    """As `RunSettings`, and what is done to the images."""

    families: Sequence[str] | None  # by default those of `FAMILIES` that the library has
    severities: Sequence[int]  # of 1 to 5; by default all
    seed: int
    batch_size: int
    device: torch.device | str | None  # by default where the encoder is


def evaluate_corruptions(
    encoder: Encoder, bank: TextBank, dataset: LabelledImages, **settings: Unpack[CorruptionSettings]
) -> list[RobustnessResult]:
    """Accuracy on corrupted images of at least 32 pixels a side, one result per severity; see `CorruptionSettings`."""
    rest: Any = dict(settings)
    families, device, seed = rest.pop("families", None), rest.pop("device", None), rest.pop("seed", 0)
    if families is None:
        families = [name for name in FAMILIES if name in library().corruption_dict]
    if device is not None:
        encoder.to(torch.device(device))
    task = Corruptions(encoder, bank, dataset, "all", families, rest.pop("severities", SEVERITIES), seed)
    # Each severity is a corruption of its own: what fell at a lower one may stand at a higher one.
    once = Protocol(PROTOCOL, (), carry=False)
    return evaluate(task, RobustnessProtocol(once, (1.0,), batch_size=rest.pop("batch_size", 64), seed=seed), **rest)
