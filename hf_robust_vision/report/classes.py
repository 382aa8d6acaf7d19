"""Which classes fall: clean and robust accuracy of each class, of one model after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from hf_robust_vision.evaluation.results import SampleRecord, pretty_eps, wilson_interval
from hf_robust_vision.evaluation.tasks import ZeroShot

from .examples import Measured
from .tables import Point


SHOWN = 10
ABOUT = (
    "Worst first: by what stands at the smallest radius, then at the larger ones, then clean. Of few images an interval "
    "is wide, and the worst of many classes look worse than they are."
)


@dataclass(frozen=True)
class ClassRow:
    """One class: its name, its images, and accuracies with their 95 % intervals, clean and at each radius."""

    name: str
    count: int
    points: list[Point]


@dataclass(frozen=True)
class ClassTable:
    """The classes of one model that have images, the worst first."""

    label: str
    colour: int
    radii: list[str]
    rows: list[ClassRow]

    @property
    def worst(self) -> list[ClassRow]:
        """Those that a page shows at once."""
        return self.rows[:SHOWN]

    @property
    def hidden(self) -> int:
        """How many more there are."""
        return len(self.rows) - len(self.worst)

    def table(self, rows: Sequence[ClassRow]) -> tuple[list[str], list[list[object]]]:
        """Head and rows."""
        return ["class", "images", "clean", *self.radii], [[row.name, row.count, *row.points] for row in rows]


def class_tables(measured: Sequence[Measured]) -> list[ClassTable]:
    """A table for each model of one dataset and protocol whose sample records say what became of each class.

    Only zero-shot classification has classes; a radius without records has no column.
    """
    models: dict[str, list[Measured]] = {}
    for one in measured:
        if one.result.task == ZeroShot.task and one.records:
            models.setdefault(one.label, []).append(one)
    return [_table(sorted(found, key=lambda one: one.result.level)) for found in models.values()]


def _table(measured: Sequence[Measured]) -> ClassTable:
    """Of one model, its radii in rising order."""
    first = measured[0]
    counts = Counter(record.label for record in first.records)
    # A radius that was measured on other images has no place beside these.
    measured = [one for one in measured if Counter(record.label for record in one.records) == counts]
    columns = [_hits(first.records, "clean_hit"), *(_hits(one.records, "robust_hit") for one in measured)]
    levels = [0.0, *(one.result.level for one in measured)]
    rows = []
    for number, name in enumerate(first.result.class_names):
        if count := counts[number]:
            hits = [column[number] for column in columns]
            points = [Point(level, one / count, *wilson_interval(one, count)) for level, one in zip(levels, hits)]
            rows.append(ClassRow(name, count, points))
    rows.sort(key=lambda row: [point.value for point in (*row.points[1:], row.points[0])])
    return ClassTable(first.label, first.colour, [pretty_eps(one.result) for one in measured], rows)


def _hits(records: Sequence[SampleRecord], kind: str) -> Counter[int | str]:
    return Counter(record.label for record in records if getattr(record, kind))
