"""Results of any number of models as a Markdown page and one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from hf_robust_vision.evaluation.consistency import check_results
from hf_robust_vision.evaluation.results import RobustnessResult, load_results, pretty_eps, write_atomically

from .curve import COLOURS, STYLE, Curve, Point, draw_curves, palette
from .escape import markdown, markdown_code
from .examples import Example, Source, pick_examples


TASKS = {
    "zero_shot": "zero-shot classification",
    "retrieval": "retrieval",
    "vqa": "question answering",
    "caption": "captioning",
    "corruption": "corruptions",
}
# Of an attack: said by its name, changing with each radius, or found by it rather than set.
_NO_SETTINGS = ("algorithm", "step_size", "robust_accuracy", "accuracy", "ci95", "severity")
_TONES = {"passed": "good", "flagged": "bad"}


@dataclass(frozen=True)
class Check:
    """One sanity check as a page shows it; `tone` is "good", "bad" or "plain"."""

    name: str
    verdict: str
    tone: str
    numbers: list[tuple[str, str]]


@dataclass(frozen=True)
class ModelRow:
    """One model's line in a section: its clean point and one at each radius it was measured at."""

    label: str
    colour: int
    sha256: str
    clean: Point
    robust: dict[float, Point]
    seconds: float
    training: list[tuple[str, str]]
    checks: list[Check]


@dataclass(frozen=True)
class Section:
    """All results of one dataset, task and protocol."""

    title: str
    anchor: str
    result: RobustnessResult  # any of them: what they share
    radii: list[tuple[float, str]]
    models: list[ModelRow]
    attacks: list[dict[str, str]]
    notes: list[str]
    curve: str
    curve_file: str
    examples: list[Example] = field(default_factory=list)

    @property
    def unchecked(self) -> list[str]:
        """Models without sanity checks."""
        return [model.label for model in self.models if not model.checks]


def write_report(
    files: Sequence[str | Path], output_dir: str | Path, *, title: str = "Robustness report", examples: int = 4
) -> list[Path]:
    """Write `report.html`, which needs no other file and no network, `report.md`, and the curves beside the latter.

    Args:
        files: `robustness.json` files or their folders; "LABEL=FILE" names the model of a file, or the hardened one.
        output_dir: Where they go.
        title: Of the page.
        examples: Attacked images shown for each dataset, from what was saved (`--save_examples`).

    Returns:
        The files written.

    Raises:
        ValueError: If there is no result, or a file can not be read.
    """
    sources = read_sources(files)
    sections = [_section(part, place, examples) for place, part in enumerate(_grouped(sources), start=1)]
    versions = {f"{name} {number}" for source in sources for name, number in source.result.versions.items()}
    shared = {
        "title": title,
        "sections": sections,
        "models": list({source.label: source.colour for source in sources}.items()),
        "datasets": list(dict.fromkeys(f"{source.result.dataset} ({source.result.split})" for source in sources)),
        "means": _means(sections),
        "versions": sorted(versions),
        "tasks": TASKS,
    }
    folder = Path(output_dir)
    pages = [folder / "report.html", folder / "report.md"]
    write_atomically(pages[0], _template("report.html").render(**shared, palette=palette(), curve_style=STYLE))
    write_atomically(pages[1], _template("report.md").render(**shared))
    for section in sections:
        pages.append(folder / section.curve_file)
        write_atomically(pages[-1], f"{_curve(section.models, section.result, alone=True)}\n")
    return pages


def results_text(results: Sequence[RobustnessResult]) -> str:
    """One line a result, for a terminal."""
    rows = []
    for row in results:
        clean, robust = (
            f"{100 * getattr(row, name):.1f} % ({100 * row.ci95[name][0]:.1f} to {100 * row.ci95[name][1]:.1f})"
            for name in ("clean_accuracy", "robust_accuracy")
        )
        where = f"{row.dataset} ({row.split}, {row.num_samples}), {row.protocol}, {row.norm} {pretty_eps(row)}"
        rows.append(f"{where}: clean {clean}, robust {robust}")
    return "\n".join(rows)


def read_sources(files: Sequence[str | Path]) -> list[Source]:
    """All results of some files with a label and a colour for each model; the same measurement counts once.

    "before" becomes "undefended", "after" the training method; models that would share a label carry a piece of their
    hash. The undefended model, where there is one, has the first place and colour.

    Raises:
        ValueError: If there is no result, or a file can not be read.
    """
    rows: list[tuple[str, RobustnessResult, Path]] = []
    for file in files:
        named, path = _split(str(file))
        try:
            results = load_results(path)
        except OSError as error:
            raise ValueError(f"{path} is no robustness.json and holds none: {error}") from error
        folder = path if path.is_dir() else path.parent
        check_results(results, folder)
        rows += [(_label(result, named), result, folder) for result in results]
    if not rows:
        raise ValueError(f"no results in {', '.join(map(str, files))}.")
    hashes: dict[str, set[str]] = {}
    for label, result, _ in rows:
        hashes.setdefault(label, set()).add(result.model_sha256)
    unique = [
        (label if len(hashes[label]) == 1 else f"{label} {result.model_sha256[:6]}", result, folder)
        for label, result, folder in rows
    ]
    labels = sorted({label: None for label, _, _ in unique}, key=lambda label: not label.startswith("undefended"))
    first = 0 if labels[0].startswith("undefended") else 1  # grey is the undefended model's
    colours = {label: first + place for place, label in enumerate(labels)}
    found: dict[tuple[Any, ...], Source] = {}
    for label, result, folder in unique:
        found.setdefault((label, _shared(result), result.level), Source(label, colours[label], result, folder))
    return sorted(found.values(), key=lambda source: source.colour)


def checks_of(sanity: Mapping[str, Any] | None) -> list[Check]:
    """Sanity checks, as `check_sanity` gives them, as a page shows them."""
    if sanity is None:
        return []
    checks = []
    for check in sanity["checks"] or [{"name": "all checks", "verdict": sanity["verdict"], "why": sanity["why"]}]:
        numbers = [(_words(key), _text(number)) for key, number in check.get("numbers", {}).items()]
        if check["verdict"] != "not run":
            numbers.insert(0, ("wanted", _words(check["threshold"])))
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


def _shared(result: RobustnessResult) -> tuple[Any, ...]:
    """What results must have in common to stand in one table."""
    steps = tuple((attack["name"], attack.get("steps"), attack.get("resolution")) for attack in result.attacks)
    data = (result.dataset, result.split, result.group, result.num_samples, result.template_hash)
    return result.task, result.metric, *data, result.norm, result.protocol, steps


def _grouped(sources: Sequence[Source]) -> list[list[Source]]:
    groups: dict[tuple[Any, ...], list[Source]] = {}
    for source in sources:
        groups.setdefault(_shared(source.result), []).append(source)
    return list(groups.values())


def _section(sources: Sequence[Source], place: int, examples: int) -> Section:
    result = sources[0].result
    group = "" if result.group == "all" else f", {result.group}"
    measured = "" if result.metric == "accuracy" else f", {_words(result.metric)}"
    title = f"{result.dataset} ({result.split}{group}){measured}"
    models = [_model([s for s in sources if s.label == label]) for label in dict.fromkeys(s.label for s in sources)]
    radii = sorted({(source.result.level, pretty_eps(source.result)) for source in sources})
    return Section(
        title=title,
        anchor=f"data-{place}",
        result=result,
        radii=radii,
        models=models,
        attacks=_attacks(sources),
        notes=_notes(sources),
        curve=_curve(models, result),
        curve_file=f"curve-{place}.svg",
        examples=pick_examples(sources, examples),
    )


def _model(sources: Sequence[Source]) -> ModelRow:
    result = sources[0].result
    checks = []
    for sanity in {
        str(source.result.sanity): source.result.sanity for source in sources if source.result.sanity
    }.values():
        checks += checks_of(sanity)
    return ModelRow(
        label=sources[0].label,
        colour=sources[0].colour,
        sha256=result.model_sha256,
        clean=Point(0.0, result.clean_accuracy, *result.ci95["clean_accuracy"]),
        robust={
            source.result.level: Point(
                source.result.level,
                source.result.robust_accuracy,
                *source.result.ci95["robust_accuracy"],
            )
            for source in sources
        },
        seconds=max(source.result.seconds for source in sources),
        training=[
            (_words(key), _text(value))
            for key, value in next((s.result.training for s in sources if s.result.training), {}).items()
            if value is not None
        ],
        checks=checks,
    )


def _attacks(sources: Sequence[Source]) -> list[dict[str, str]]:
    """Rows of the table of attacks: each once for each way it was run, with the radii and the models of that way."""
    ways: dict[str, tuple[dict[str, Any], dict[float, str], dict[str, None]]] = {}
    for source in sources:
        for attack in source.result.attacks:
            settings = _settings(attack)
            _, radii, models = ways.setdefault(str(settings), (settings, {}, {}))
            radii[source.result.level] = pretty_eps(source.result)
            models[source.label] = None
    columns = list(dict.fromkeys(key for settings, _, _ in ways.values() for key in settings))
    everybody = {source.label for source in sources}
    rows = []
    for settings, radii, models in ways.values():
        row = {_words(key): _text(settings.get(key, "")) for key in columns} | {
            "radii": ", ".join(text for _, text in sorted(radii.items()))
        }
        rows.append(row | {"models": "all" if set(models) == everybody else ", ".join(models)})
    return rows


def _settings(attack: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attack.items() if key not in _NO_SETTINGS and value is not None}


def _notes(sources: Sequence[Source]) -> list[str]:
    notes = []
    if sources[0].result.metric == "targeted_success":
        notes.append("The numbers are the shares of images that resist: the attacker's target is not said on them.")
    left_out = sorted({name for source in sources for name in source.result.left_out})
    if left_out:
        why = "were not asked for" if sources[0].result.task == "corruption" else "are not defined for so few classes"
        notes.append(f"Left out, because they {why}: {', '.join(left_out)}.")
    for level in sorted({source.result.level for source in sources}):
        here = [source for source in sources if source.result.level == level]
        if len({str([_settings(attack) for attack in source.result.attacks]) for source in here}) > 1:
            notes.append(
                f"The models were not attacked alike at {pretty_eps(here[0].result)}; see the table of attacks."
            )
    return notes


def _curve(models: Sequence[ModelRow], result: RobustnessResult, alone: bool = False) -> str:
    curves = [
        Curve(model.label, model.colour, [model.clean, *(p for eps, p in sorted(model.robust.items()) if eps > 0)])
        for model in models
    ]
    axis = "radius in 255ths of the pixel range, Linf" if result.norm == "linf" else f"radius, {result.norm}"
    axis = axis if result.severity is None else "severity"
    chance = 1 / len(result.class_names) if result.task == "zero_shot" and result.class_names else None
    title = f"Accuracy over eps on {result.dataset} ({result.split}), {result.protocol}"
    scale = f"{_words(result.metric)}, %" if result.metric != "targeted_success" else "images that resist, %"
    return draw_curves(curves, axis=axis, scale=scale, title=title, chance=chance, alone=alone)


def _means(sections: Sequence[Section]) -> dict[str, Any] | None:
    """Plain means over datasets, for the models and radii that all of them share; None where there is no such mean."""
    first = sections[0].result
    alike = all(
        (row.task, row.metric, row.norm, row.protocol) == (first.task, first.metric, first.norm, first.protocol)
        for row in (section.result for section in sections)
    )
    distinct = len({section.title for section in sections}) == len(sections)
    labels = [m.label for m in sections[0].models if all(m.label in {o.label for o in s.models} for s in sections)]
    measured = [section.models for section in sections]
    radii = [
        (level, text)
        for level, text in sections[0].radii
        if all(level in model.robust for models in measured for model in models if model.label in labels)
    ]
    if len(sections) < 2 or not (alike and distinct and labels and radii):
        return None
    rows = []
    for label in labels:
        models = [next(model for model in section.models if model.label == label) for section in sections]
        columns = [[model.clean.value for model in models]]
        columns += [[model.robust[eps].value for model in models] for eps, _ in radii]
        rows.append((label, models[0].colour, [sum(column) / len(column) for column in columns]))
    return {"radii": radii, "rows": rows, "count": len(sections)}


def _words(name: str) -> str:
    return str(name).replace("_", " ")


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(key)}: {_text(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value)
    return str(value)


@lru_cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=name.endswith(".html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    if name.endswith(".md"):
        environment.finalize = markdown
    environment.filters |= {"percent": lambda share: f"{100 * share:.1f}", "code": markdown_code}
    environment.globals |= {"colours": len(COLOURS)}
    return environment.get_template(name)
