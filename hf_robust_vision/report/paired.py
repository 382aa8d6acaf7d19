"""How far models lie from the first of their table, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_robust_vision.evaluation.consistency import check_results
from hf_robust_vision.evaluation.paired import Difference, NotPaired, compare_samples
from hf_robust_vision.evaluation.results import RobustnessResult, pretty_eps

from .escape import one_line
from .examples import Measured
from .protocol import alike
from .tables import text_table


ABOUT = (
    "Points over the same samples, with Newcombe's paired 95 % intervals, not corrected for their number. "
    "An interval that holds 0 does not tell two models apart; none says anything about other training seeds."
)


@dataclass
class PairedRow:
    """One model's distance from the first: clean, and at each level that was measured for both."""

    label: str
    colour: int
    clean: Difference | None = None
    robust: dict[float, Difference] = field(default_factory=dict)

    def cells(self, levels: Sequence[float]) -> list[Any]:
        """Its differences in the order of a table's columns."""
        return [found or "not paired" for found in (self.clean, *map(self.robust.get, levels))]


class Pairs:
    """The models of one table against the first of them, as far as their sample records allow.

    `rows` are those that could be compared, and `missing` a sentence about those that could not.
    """

    def __init__(self, measured: Sequence[Measured]):
        models: dict[str, dict[float, Measured]] = {}
        for one in measured:
            models.setdefault(one.label, {})[one.result.level] = one
        self.reference, *others = models
        self.radii = sorted({(one.result.level, pretty_eps(one.result)) for one in measured})
        self._eps: dict[float | None, float] = {one.result.level: one.result.eps for one in measured}
        self.rows: list[PairedRow] = []
        self._reasons: dict[str, list[str]] = {}
        for label in others:
            row, reasons = _compare(models[label], models[self.reference])
            if row.clean or row.robust:
                self.rows.append(row)
            for why, levels in reasons.items():
                at = f" at {', '.join(levels)}" if row.clean or row.robust else ""
                self._reasons.setdefault(why, []).append(f"{label}{at}")

    @property
    def missing(self) -> str:
        """Who could not be compared, and why; empty where nothing is missing."""
        told = "; ".join(f"{', '.join(labels)} ({why})" for why, labels in self._reasons.items())
        return f"Not paired with {self.reference}: {told}." if told else ""

    @property
    def table(self) -> tuple[list[str], list[list[Any]]]:
        """Head and rows."""
        levels = [level for level, _ in self.radii]
        head = ["model", "clean", *(radius for _, radius in self.radii)]
        return head, [[row.label, *row.cells(levels)] for row in self.rows]

    def text(self) -> str:
        """For a terminal; empty where there is nothing to compare."""
        head = f"minus {one_line(self.reference)}, in points over the same samples (what holds 0 is not told apart):"
        table = f"{head}\n{text_table(*self.table)}" if self.rows else ""
        return "\n".join(filter(None, (table, one_line(self.missing))))

    def to_dict(self) -> dict[str, Any]:
        """For a machine: one entry a difference, fractions in [-1, 1], and the sentence about what is missing."""
        entries: list[dict[str, Any]] = []
        for row in self.rows:
            found = {None: row.clean} | row.robust
            entries += [
                {"model": row.label, "minus": self.reference}
                | {"accuracy": "clean_accuracy" if level is None else "robust_accuracy", "eps": self._eps.get(level)}
                | {"difference": one.value, "ci95": [one.low, one.high]}
                for level, one in found.items()
                if one is not None
            ]
        return {"paired": entries, "not_paired": self.missing}


def pairs_of(results: Sequence[RobustnessResult], folder: str | Path) -> Pairs:
    """The models of some results, whose records lie in a folder, against the undefended one, else the first."""
    records = check_results(results, folder)
    ordered = sorted(results, key=lambda result: result.model not in ("before", "undefended"))
    measured = [Measured(one.model, 0, one, Path(folder), records.get(str(one.samples), ())) for one in ordered]
    return Pairs(measured)


def _compare(
    model: Mapping[float, Measured], reference: Mapping[float, Measured]
) -> tuple[PairedRow, dict[str, list[str]]]:
    """One model's row, and at which radii what stood in the way."""
    first = next(iter(model.values()))
    row, reasons = PairedRow(first.label, first.colour), dict[str, list[str]]()
    for level in sorted(model.keys() & reference.keys()):
        one, other = model[level], reference[level]
        try:
            if alike(one.result) != alike(other.result):
                raise NotPaired("measured otherwise")
            if one.records and not other.records:
                raise NotPaired(f"no sample records of {other.label}")
            row.clean, row.robust[level] = compare_samples((one.result, one.records), (other.result, other.records))
        except NotPaired as why:
            reasons.setdefault(str(why), []).append(pretty_eps(one.result))
    if not model.keys() & reference.keys():
        reasons["no radius in common"] = []
    return row, reasons
