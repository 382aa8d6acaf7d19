"""Results of any number of models as a Markdown page and one self-contained HTML file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from hf_robust_vision.evaluation.consistency import check_results
from hf_robust_vision.evaluation.results import RobustnessResult, load_results, pretty_eps
from hf_robust_vision.files import write_atomically

from . import classes, paired, protocol
from .curve import COLOURS, axes_of, colours_of, curve_of, draw_curves
from .examples import Measured, pick_examples
from .tables import percent, point, setting, training_settings, words
from .templates import template


_TONES = {"passed": "good", "flagged": "bad"}


class Check(NamedTuple):
    """One sanity check as a page shows it."""

    name: str
    verdict: str
    tone: str  # "good", "bad" or "plain"
    numbers: list[tuple[str, str]]


class ModelRow:
    """One model's line in a section: its clean point and one at each level it was measured at."""

    def __init__(self, measured: Sequence[Measured]):
        results = [one.result for one in measured]
        sanity = {str(result.sanity): result.sanity for result in results}
        self.label, self.colour, self.sha256 = measured[0].label, measured[0].colour, results[0].model_sha256
        self.clean = point(results[0], "clean")
        self.robust = {result.level: point(result, "robust") for result in results}
        self.curve = curve_of(self.label, self.colour, results)
        self.training = next((training_settings(result) for result in results if result.training), [])
        self.checks = [check for found in sanity.values() for check in checks_of(found)]


class Section(protocol.Table):
    """All results of one dataset, task and protocol, as the pages show them."""

    def __init__(self, measured: Sequence[Measured], place: int, examples: int):
        super().__init__([(one.label, one.result) for one in measured])
        self.place = place
        self.radii = sorted({(result.level, pretty_eps(result)) for _, result in self.results})
        self.levels = [level for level, _ in self.radii]
        self.models = [ModelRow([one for one in measured if one.label == label]) for label in dict(self.results)]
        self.paired = paired.Pairs(measured)
        self.classes = classes.class_tables(measured)
        self.examples = pick_examples(measured, examples)

    @property
    def curve_file(self) -> str:
        """The curve beside the Markdown page."""
        return f"curve-{self.place}.svg"

    def curve(self, alone: bool = False) -> str:
        """The curve as SVG."""
        result = self.result
        chance = 1 / len(result.class_names) if result.task == "zero_shot" and result.class_names else None
        title = f"Accuracy over eps on {result.dataset} ({result.split}), {result.protocol}"
        curves = [model.curve for model in self.models]
        return draw_curves(curves, axes_of(result), title=title, chance=chance, alone=alone)


def write_report(
    files: Sequence[str | Path], output_dir: str | Path, *, title: str = "Robustness report", examples: int = 4
) -> list[Path]:
    """Write `report.html`, which needs no other file and no network, `report.md`, and the curves beside the latter.

    Args:
        files: `robustness.json` files or their folders; "LABEL=FILE" names the model of a file, or the hardened one.
        output_dir: Where they go.
        title: Of the page.
        examples: Attacked images shown for each dataset, from what was saved (`--save_examples`).

    Raises:
        ValueError: If there is no result, a file can not be read, or records say something else than their result.
    """
    measured = read_measured(files)
    tables = protocol.grouped((one, one.result) for one in measured)
    sections = [Section(table, place, examples) for place, table in enumerate(tables, start=1)]
    versions = {f"{name} {number}" for one in measured for name, number in one.result.versions.items()}
    shared = {
        "title": title,
        "sections": sections,
        "models": list({one.label: one.colour for one in measured}.items()),
        "datasets": list(dict.fromkeys(f"{one.result.dataset} ({one.result.split})" for one in measured)),
        "means": _means(sections),
        "versions": ", ".join(sorted(versions)),
        "colours": COLOURS,
        "about": {"paired": paired.ABOUT, "classes": classes.ABOUT},
    }
    folder = Path(output_dir)
    pages = [folder / "report.html", folder / "report.md"]
    for page in pages:
        write_atomically(page, template(page.name).render(**shared))
    for section in sections:
        pages.append(folder / section.curve_file)
        write_atomically(pages[-1], section.curve(alone=True))
    return pages


def read_measured(files: Sequence[str | Path]) -> list[Measured]:
    """All results of some files with a label and a colour for each model; the same measurement counts once.

    "before" becomes "undefended", "after" the training method; models that would share a label carry a piece of their
    hash. The undefended model, where there is one, has the first place and colour.
    """
    rows: list[Measured] = []
    for file in files:
        named, path = _split(str(file))
        try:
            results = load_results(path)
        except OSError as error:
            raise ValueError(f"{path} is no robustness.json and holds none: {error}") from error
        folder = path if path.is_dir() else path.parent
        records = check_results(results, folder)
        rows += [Measured(_label(one, named), 0, one, folder, records.get(str(one.samples), ())) for one in results]
    if not rows:
        raise ValueError(f"no results in {', '.join(map(str, files))}.")
    models = Counter(label for label, _ in {(row.label, row.result.model_sha256) for row in rows})
    unique = [
        row if models[row.label] == 1 else replace(row, label=f"{row.label} {row.result.model_sha256[:6]}")
        for row in rows
    ]
    colours = colours_of((row.label for row in unique), "undefended")
    found: dict[tuple[Any, ...], Measured] = {}
    for row in unique:
        key = (row.label, protocol.alike(row.result), row.result.level)
        found.setdefault(key, replace(row, colour=colours[row.label]))
    return sorted(found.values(), key=lambda one: one.colour)


def checks_of(sanity: Mapping[str, Any] | None) -> list[Check]:
    """Sanity checks, as `check_sanity` gives them, as a page shows them."""
    if sanity is None:
        return []
    checks = []
    for check in sanity["checks"] or [{"name": "all checks", "verdict": sanity["verdict"], "why": sanity["why"]}]:
        numbers = [(words(key), setting(key, number)) for key, number in check.get("numbers", {}).items()]
        if check["verdict"] != "not run":
            numbers.insert(0, ("wanted", words(check["threshold"])))
        if check["verdict"] != "passed":
            numbers.append(("why", check["why"]))
        checks.append(Check(check["name"], check["verdict"], _TONES.get(check["verdict"], "plain"), numbers))
    return checks


def _split(text: str) -> tuple[str | None, Path]:
    """A file, or LABEL=FILE."""
    label, equals, path = text.partition("=")
    return (label, Path(path)) if equals and not Path(text).exists() else (None, Path(text))


def _label(result: RobustnessResult, named: str | None) -> str:
    if result.model == "before":
        return "undefended"
    if named is not None:
        return named
    return str((result.training or {}).get("method") or result.model) if result.model == "after" else result.model


def _means(sections: Sequence[Section]) -> dict[str, Any] | None:
    """Plain means over datasets, for the models and radii that all of them share; None where there is no such mean."""
    kinds = {(row.task, row.metric, row.norm, row.protocol) for row in (section.result for section in sections)}
    # Two tables of one title are one dataset under two attacks.
    if len(sections) < 2 or len(kinds) > 1 or len({section.title for section in sections}) < len(sections):
        return None
    tables = [{model.label: model for model in section.models} for section in sections]
    labels = [label for label in tables[0] if all(label in table for table in tables)]
    models = {label: [table[label] for table in tables] for label in labels}
    everywhere = [model for row in models.values() for model in row]
    radii = [radius for radius in sections[0].radii if all(radius[0] in model.robust for model in everywhere)]
    rows = []
    for label, row in models.items():
        columns = [[model.clean for model in row], *([model.robust[level] for model in row] for level, _ in radii)]
        means = [percent(sum(point.value for point in column) / len(column)) for column in columns]
        rows.append({"colour": row[0].colour, "cells": [label, *means]})
    return {"radii": [text for _, text in radii], "rows": rows, "count": len(sections)} if labels and radii else None
