"""Do results and the sample records behind them say the same? What is published or drawn has passed this."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from .results import RobustnessResult, SampleRecord, load_samples
from .task import Task
from .tasks import TASKS


_ACCURACIES = ("clean_accuracy", "robust_accuracy")


def check_results(results: Sequence[RobustnessResult], folder: str | Path) -> dict[str, list[SampleRecord]]:
    """Refuse results without an attack, or whose records say something else; records that are not there are not missed.

    Returns:
        The records in `folder`, by the name of their file.

    Raises:
        ValueError: If something does not fit; the message names the file.
    """
    names = {result.samples for result in results if result.samples and (Path(folder) / result.samples).is_file()}
    records = {name: load_samples(Path(folder) / name) for name in sorted(names)}
    for result in results:
        check_attacked(result)
        if result.samples in records:
            check_samples(result, records[result.samples])
    for measurement in measurements([result for result in results if result.samples in records]):
        for smaller, larger in pairwise(measurement):
            _check_radii(smaller, larger, records)
    return records


def measurements(results: Sequence[RobustnessResult]) -> list[list[RobustnessResult]]:
    """Results that were measured together, each at rising radii: their files' names differ in the radius only."""

    def together(result: RobustnessResult) -> tuple[Any, ...]:
        return *result.run, re.sub(r"-eps[\d.e+-]+(?=-\w+\.jsonl$)", "", str(result.samples))

    ordered = sorted(results, key=lambda result: (together(result), result.level))
    return [list(found) for _, found in groupby(ordered, key=together)]


def check_attacked(result: RobustnessResult) -> None:
    """Refuse a robust accuracy that no attack, or one without steps, was made for."""
    idle = [row["name"] for row in result.attacks if 0 in (row.get("steps"), row.get("restarts"))]
    if result.eps > 0 and (idle or not result.attacks):
        raise ValueError(
            f"{_named(result)} was measured with {f'no step of {idle[0]}' if idle else 'no attack'}: its robust accuracy "
            "means nothing; measure it again, with steps."
        )


def check_samples(result: RobustnessResult, records: Sequence[SampleRecord]) -> None:
    """Refuse records that a result can not be the sum of: their number, a label, an attack or an accuracy."""
    where = f"{result.samples or 'the records'} of {_named(result)}"
    task = TASKS.get(result.task, Task)
    if len(records) != (count := result.num_samples * task.copies(result)):
        raise ValueError(f"{where} should hold {count} samples, it holds {len(records)}.")
    blamed = {None, "clean", *(row["name"] for row in result.attacks)}
    for record in records:
        if record.fooled_by not in blamed:
            raise ValueError(
                f"{where}: sample {record.id!r} was fooled by {record.fooled_by!r}, which is no attack of it."
            )
        if complaint := task.complaint(record, result):
            raise ValueError(f"{where}: {complaint}")
    for name, column in zip(_ACCURACIES, outcomes(result, records)):
        if not _sums_up(result, name, column):
            raise ValueError(
                f"{where} give a {name} of {fmean(column):.6g}, the result says {getattr(result, name):.6g}."
            )


def outcomes(result: RobustnessResult, records: Sequence[SampleRecord]) -> tuple[list[float], list[float]]:
    """What each sample adds to clean and to robust accuracy: 0 or 1; where these are mean scores, its scores."""
    task = TASKS.get(result.task, Task)
    flags = [task.hits(record, result.metric) for record in records]
    columns = [float(clean) for clean, _ in flags], [float(robust) for _, robust in flags]
    scores = [(record.clean_score, record.score) for record in records if record.score is not None]
    clean_scores = [clean for clean, _ in scores if clean is not None]
    # A task may keep scores of clean images and still count flags: the sums tell which.
    flagged = all(_sums_up(result, name, column) for name, column in zip(_ACCURACIES, columns))
    return columns if flagged or len(clean_scores) < len(records) else (clean_scores, [score for _, score in scores])


def _sums_up(result: RobustnessResult, name: str, column: Sequence[float]) -> bool:
    return abs(fmean(column) - getattr(result, name)) <= 1e-6


def _check_radii(
    smaller: RobustnessResult, larger: RobustnessResult, records: Mapping[str, Sequence[SampleRecord]]
) -> None:
    """A sample that fell in the smaller ball has fallen in the larger one, which holds it."""
    where = f"{larger.samples} and {smaller.samples}"
    below, above = records[str(smaller.samples)], records[str(larger.samples)]
    stood = {record.id: (record, hit) for record, hit in zip(below, outcomes(smaller, below)[1])}
    for record, hit in zip(above, outcomes(larger, above)[1]):
        other, before = stood.get(record.id, (None, 0.0))
        if other is None or (other.label, other.clean) != (record.label, record.clean):
            raise ValueError(f"{where} say different things about the clean sample {record.id!r}.")
        if larger.carry and larger.severity is None and hit > before:
            raise ValueError(f"{where}: sample {record.id!r} fell at the smaller radius and stands at the larger one.")


def _named(result: RobustnessResult) -> str:
    return f"{result.model} on {result.dataset} ({result.protocol}, {result.threat})"
