"""Numbers and settings as people read them, and tables of them, for page, card and terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_robust_vision.evaluation.results import RESULTS_FILE, RobustnessResult, eps_text, pretty_eps

from .escape import Verbatim, markdown, one_line


def percent(share: float) -> str:
    """A fraction in percent."""
    return f"{100 * share:.1f} %"


@dataclass(frozen=True)
class Point:
    """Accuracy with its 95 % interval, all fractions, at a level in the unit of the axis."""

    eps: float
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{percent(self.value)} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def point(result: RobustnessResult, kind: str) -> Point:
    """The "clean" or the "robust" accuracy of a result."""
    name = f"{kind}_accuracy"
    return Point(0.0 if kind == "clean" else result.level, getattr(result, name), *result.ci95[name])


def counted(number: int, noun: str) -> str:
    """A number of things: "1 class", "2 classes", "3 samples"."""
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def words(name: Any) -> str:
    """The name of a field as words."""
    return str(name).replace("_", " ")


def setting(name: str, value: Any, norm: str = "linf") -> str:
    """The value of a setting; radii and steps as `eps_text` says them."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return eps_text(value, norm) if name.endswith(("eps", "step_size")) else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{words(key)}: {setting(key, item, norm)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(setting(name, item, norm) for item in value)
    return str(value)


def training_settings(result: RobustnessResult) -> list[tuple[str, str]]:
    """How a model was trained; what has no value is left out."""
    training = result.training or {}
    norm = training.get("norm", "linf")
    return [(words(key), setting(key, value, norm)) for key, value in training.items() if value is not None]


def markdown_table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> Verbatim:
    """A table of Markdown; what its cells hold shows as it is."""
    lines = [f"| {' | '.join(map(markdown, row))} |" for row in (head, *rows)]
    return Verbatim("\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]]))


def text_table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """A table for a terminal, its columns flush right."""
    cells = [[one_line(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def results_text(results: Sequence[RobustnessResult]) -> str:
    """A table for each data set and protocol: one line a radius, with what each attack leaves; for a terminal."""
    groups: dict[tuple[Any, ...], list[RobustnessResult]] = {}
    for row in results:
        groups.setdefault((row.model, *row.run[:5], row.protocol, row.norm, row.num_samples), []).append(row)
    return "\n\n".join(map(_table_of, groups.values()))


def _table_of(rows: Sequence[RobustnessResult]) -> str:
    first = rows[0]
    group = "" if first.group == "all" else f", {first.group}"
    head = f"{first.model} on {first.dataset} ({first.split}{group}, {counted(first.num_samples, 'sample')})"
    measured = "" if first.metric == "accuracy" else f"{words(first.metric)}, "
    # Of corruptions and captions an attack has no count of what it leaves.
    names = list(dict.fromkeys(one["name"] for row in rows for one in row.attacks if "robust_accuracy" in one))
    lines = [[row.threat, point(row, "clean"), *_left(row, names), point(row, "robust")] for row in rows]
    columns = ["radius", "clean", *(f"after {name}" for name in names), "robust"]
    return f"{one_line(f'{head}: {measured}{first.protocol}')}\n{text_table(columns, lines)}"


def _left(row: RobustnessResult, names: Sequence[str]) -> list[str]:
    left = {one["name"]: percent(one["robust_accuracy"]) for one in row.attacks if "robust_accuracy" in one}
    return [left.get(name, "") for name in names]


def lying(folder: str | Path, pages: Sequence[str] = ()) -> str:
    """Where results lie, for a terminal: the numbers, and pages that show them."""
    shown = [f"page: {page}" for page in pages if not page.endswith(".svg")]
    return "\n".join([f"numbers: {Path(folder) / RESULTS_FILE}", *shown])


def models_text(results: Sequence[RobustnessResult]) -> str:
    """Clean and robust accuracy of models that were measured alike, one line a model, for a terminal."""
    radii = list(dict.fromkeys(pretty_eps(row) for row in results))
    lines: dict[str, list[Any]] = {}
    for row in results:
        lines.setdefault(row.model, [row.model, point(row, "clean")]).append(point(row, "robust"))
    return text_table(("model", "clean", *radii), list(lines.values()))


def comparison_text(results: Sequence[RobustnessResult]) -> str:
    """Clean and robust accuracy before and after, one line a radius, for a terminal."""
    before, after = ([row for row in results if row.model == model] for model in ("before", "after"))
    rows = [("clean", point(before[0], "clean"), point(after[0], "clean"))]
    rows += [(pretty_eps(one), point(one, "robust"), point(two, "robust")) for one, two in zip(before, after)]
    return text_table(("eps", "before", "after"), rows)
