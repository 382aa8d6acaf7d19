"""Attacked images for a report: the clean one, and what each model made of it under attack."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import RobustnessResult, load_samples, pretty_eps


@dataclass(frozen=True)
class Source:
    """One result with the files behind it.

    Args:
        label: Of the model.
        colour: Of the model.
        result: Its numbers.
        folder: Where its files lie.
    """

    label: str
    colour: int
    result: RobustnessResult
    folder: Path


@dataclass(frozen=True)
class Look:
    """What one model says about one image before and after the attack; pictures are `data:` addresses.

    Args:
        label: Of the model.
        colour: Of the model.
        before: Its answer on the clean image.
        after: Its answer under attack.
        right_before: Is the first answer right?
        right_after: Is the second one right?
        gain: How much the picture of the perturbation is enlarged; 0 where there is none.
        perturbation: Picture, None where the sample was wrong before and so not attacked.
        adversarial: Picture, None likewise.
    """

    label: str
    colour: int
    before: str
    after: str
    right_before: bool
    right_after: bool
    gain: float = 0.0
    perturbation: str | None = None
    adversarial: str | None = None


@dataclass(frozen=True)
class Example:
    """One sample: its truth, its clean picture, the radius shown, and each model's look at it."""

    sample: int | str
    truth: str
    eps: str
    clean: str
    looks: list[Look]


class _Saved:
    """Records and images of one result that saved some."""

    def __init__(self, source: Source):
        result = source.result
        assert result.samples is not None
        assert result.images is not None
        self.source, self.eps = source, result.eps
        self.images = AdversarialImages(source.folder / result.images)
        self.records = {record.id: record for record in load_samples(source.folder / result.samples)}

    def name(self, answer: int | str | None) -> str:
        names = self.source.result.class_names
        return names[answer] if isinstance(answer, int) and answer < len(names) else str(answer)

    def look(self, sample: int | str) -> Look:
        record = self.records[sample]
        answers = (
            self.name(record.clean),
            self.name(record.clean if record.adversarial is None else record.adversarial),
        )
        shared = (self.source.label, self.source.colour, *answers, record.clean_hit, record.robust_hit)
        clean, adversarial = self.images.read(sample, self.eps)
        size = (adversarial - clean).abs().max().item()
        if size == 0:
            return Look(*shared)
        gain = 0.5 / size
        return Look(*shared, gain, picture((adversarial - clean) * gain + 0.5), picture(adversarial))


@dataclass(frozen=True)
class _View:
    """One sample at one radius, in the eyes of the models that saved it there."""

    sample: int | str
    eps: float
    saved: list[_Saved]

    @property
    def truth(self) -> str:
        first = self.saved[0]
        return first.name(first.records[self.sample].label)

    @property
    def worth(self) -> tuple[int, int]:
        """How many models saw it; then 2 where they part under attack, 1 where whoever was right falls, else 0."""
        records = [part.records[self.sample] for part in self.saved]
        fell = any(record.clean_hit and not record.robust_hit for record in records)
        return len(records), (2 if any(record.robust_hit for record in records) else 1) if fell else 0

    def example(self) -> Example:
        clean, _ = self.saved[0].images.read(self.sample, self.eps)
        looks = [part.look(self.sample) for part in self.saved]
        return Example(self.sample, self.truth, pretty_eps(self.saved[0].source.result), picture(clean), looks)


def pick_examples(sources: Sequence[Source], count: int) -> list[Example]:
    """The samples that show most: seen by many models, some of which fell to the attack, one of each class first.

    Each is shown at the smallest radius at which the models part, else at which one falls, else at the largest.

    Args:
        sources: Results of one dataset and protocol.
        count: Examples wanted; fewer if fewer were saved.
    """
    saved = [_Saved(source) for source in sources if _has_images(source)]
    views = [_best_view(sample, saved) for sample in dict.fromkeys(i for part in saved for i in part.images.ids())]
    turns: Counter[str] = Counter()
    ordered: list[tuple[int, int, _View]] = []
    for view in sorted(views, key=lambda view: view.worth, reverse=True):
        ordered.append((turns[view.truth], len(ordered), view))
        turns[view.truth] += 1
    return [view.example() for _, _, view in sorted(ordered, key=lambda row: row[:2])[: max(count, 0)]]


def _best_view(sample: int | str, saved: Sequence[_Saved]) -> _View:
    views = []
    for eps in sorted({part.eps for part in saved}):
        seen = [part for part in saved if part.eps == eps and sample in part.images and sample in part.records]
        if seen:
            views.append(_View(sample, eps, seen))
    return max(views, key=lambda view: (view.worth, -view.eps if view.worth[1] else view.eps))


def _has_images(source: Source) -> bool:
    result = source.result
    if result.images is None or result.samples is None:
        return False
    return (source.folder / result.images).is_dir() and (source.folder / result.samples).is_file()


def picture(image: Tensor) -> str:
    """An image in [0, 1] as a PNG in a `data:` address; rounded to 256 steps, for the eye only."""
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
