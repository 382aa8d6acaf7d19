"""Attacked images for a report: the clean one, and what each model made of it under attack."""

from __future__ import annotations

import base64
import io
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image
from torch import Tensor

from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, pretty_eps


@dataclass(frozen=True)
class Measured:
    """One result with the label and the colour of its model, the folder of its files, and its records if they lie there."""

    label: str
    colour: int
    result: RobustnessResult
    folder: Path
    records: Sequence[SampleRecord] = ()


class _Saved:
    """Records and images of one result that saved some."""

    def __init__(self, measured: Measured):
        result = measured.result
        self.measured, self.eps = measured, result.eps
        self.images = AdversarialImages(measured.folder / str(result.images))
        self.records = {record.id: record for record in measured.records}

    def name(self, answer: int | str) -> str:
        names = self.measured.result.class_names
        return names[answer] if isinstance(answer, int) and answer < len(names) else str(answer)


class Look:
    """What one model answers to one image before and after the attack, and whether that is right.

    The pictures are `data:` addresses, the perturbation enlarged by `gain`; None where the sample was wrong before and
    so not attacked.
    """

    def __init__(self, saved: _Saved, sample: int | str):
        record = saved.records[sample]
        self.label, self.colour = saved.measured.label, saved.measured.colour
        self.before = saved.name(record.clean)
        self.after = saved.name(record.clean if record.adversarial is None else record.adversarial)
        self.right_before, self.right_after = record.clean_hit, record.robust_hit
        clean, adversarial = saved.images.read(sample, saved.eps)
        size = (adversarial - clean).abs().max().item()
        self.gain = 0.5 / size if size else 0.0  # the largest change becomes black or white on grey
        self.perturbation = picture((adversarial - clean) * self.gain + 0.5) if size else None
        self.adversarial = picture(adversarial) if size else None


@dataclass(frozen=True)
class Example:
    """One sample at one radius, in the eyes of the models that saved it there."""

    sample: int | str
    saved: list[_Saved]

    @property
    def eps(self) -> str:
        """The radius as people write it."""
        return pretty_eps(self.saved[0].measured.result)

    @property
    def truth(self) -> str:
        """The right answer."""
        return self.saved[0].name(self.saved[0].records[self.sample].label)

    @cached_property
    def clean(self) -> str:
        """The clean picture as a `data:` address."""
        return picture(self.saved[0].images.read(self.sample, self.saved[0].eps)[0])

    @cached_property
    def looks(self) -> list[Look]:
        """Each model's."""
        return [Look(saved, self.sample) for saved in self.saved]

    @property
    def worth(self) -> tuple[int, int, float]:
        """What makes it worth showing: how many models saw it, how they part, and the radius that shows it best.

        They part by 3 where one stands and another falls, 2 where one falls, 1 where all stand, else 0.
        """
        records = [saved.records[self.sample] for saved in self.saved]
        attacked = [record for record in records if record.clean_hit]
        fell = any(not record.robust_hit for record in attacked)
        stood = any(record.robust_hit for record in records)
        part = (3 if stood else 2) if fell else min(len(attacked), 1)
        # The smallest radius that fells a model says most; one that fells none says most where it is large.
        return len(records), part, -self.saved[0].eps if fell else self.saved[0].eps


def pick_examples(measured: Sequence[Measured], count: int) -> list[Example]:
    """The samples that show most: seen by many models, some of which fell to the attack, one of each class first.

    Each is shown at the smallest radius at which the models part, else at which one falls, else at the largest. A
    sample that no model was attacked on shows nothing. The results are of one dataset and protocol.
    """
    by_eps: dict[float, list[_Saved]] = {}
    for one in map(_Saved, filter(_has_images, measured)):
        by_eps.setdefault(one.eps, []).append(one)
    best: dict[int | str, Example] = {}
    for saved in by_eps.values():
        for sample in dict.fromkeys(sample for one in saved for sample in one.images.ids() if sample in one.records):
            example = Example(sample, [one for one in saved if sample in one.images and sample in one.records])
            best[sample] = max(best.get(sample, example), example, key=lambda view: view.worth)
    turns: dict[str, Iterator[int]] = defaultdict(itertools.count)
    shown = [example for example in best.values() if example.worth[1]]
    # Both sorts are stable: the best of every class come first, then the second best of every class.
    shown.sort(key=lambda example: example.worth[:2], reverse=True)
    return sorted(shown, key=lambda example: next(turns[example.truth]))[: max(count, 0)]


def _has_images(measured: Measured) -> bool:
    result = measured.result
    if result.images is None or not measured.records or result.severity is not None:
        return False
    return (measured.folder / result.images).is_dir()


def picture(image: Tensor) -> str:
    """An image in [0, 1] as a PNG in a `data:` address; rounded to 256 steps, for the eye only."""
    pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
