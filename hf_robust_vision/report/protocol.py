"""How results were measured, in words: which of them stand in one table, what they share, which attacks ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_robust_vision.evaluation.results import RobustnessResult, pretty_eps

from .tables import counted, setting, words


TASKS = {
    "zero_shot": "zero-shot classification",
    "vqa": "question answering",
    "caption": "captioning",
    "corruption": "corruptions",
}
# Of an attack: said by its name, changing with each radius, or found by it rather than set.
_NO_SETTINGS = ("algorithm", "step_size", "robust_accuracy", "accuracy", "ci95", "severity")

T = TypeVar("T")


def alike(result: RobustnessResult) -> tuple[Any, ...]:
    """What results must have in common to stand in one table."""
    steps = tuple((attack["name"], attack.get("steps"), attack.get("resolution")) for attack in result.attacks)
    data = (result.dataset, result.split, result.group, result.num_samples, result.template_hash)
    return result.task, result.metric, *data, result.norm, result.protocol, steps


def grouped(pairs: Iterable[tuple[T, RobustnessResult]]) -> list[list[T]]:
    """Things with a result each, those that may stand in one table together."""
    groups: dict[tuple[Any, ...], list[T]] = {}
    for thing, result in pairs:
        groups.setdefault(alike(result), []).append(thing)
    return list(groups.values())


@dataclass
class Table:
    """Results that stand in one table, each with the label of its model, and how they were measured, in words."""

    results: Sequence[tuple[str, RobustnessResult]]

    @property
    def result(self) -> RobustnessResult:
        """Any of them, for what they share."""
        return self.results[0][1]

    @property
    def title(self) -> str:
        """Which data, and what is measured where that is no accuracy."""
        result = self.result
        group = "" if result.group == "all" else f", {result.group}"
        measured = "" if result.metric == "accuracy" else f", {words(result.metric)}"
        return f"{result.dataset} ({result.split}{group}){measured}"

    @property
    def about(self) -> str:
        """What the results share, in two sentences."""
        result = self.result
        task = TASKS.get(result.task, words(result.task))
        told = [counted(result.num_samples, "sample")]
        told += [counted(len(result.class_names), "class")] if result.class_names else []
        norm = "" if result.severity is not None else f", {result.norm}"
        head = f"{task[:1].upper()}{task[1:]}, {words(result.metric)}"
        text = f"{head}; {', '.join(told)}; protocol {result.protocol}{norm}."
        if not result.templates:
            return text
        templates = counted(len(result.templates), "prompt template")
        return f"{text} {templates} (hash {result.template_hash}), such as “{result.templates[0]}”."

    @property
    def attacks(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows: each attack once for each way it was run, with the radii and the models of that way."""
        ways: dict[str, tuple[dict[str, Any], dict[float, str], dict[str, None]]] = {}
        for label, result in self.results:
            for attack in result.attacks:
                own = _settings(attack)
                _, radii, models = ways.setdefault(str(own), (own, {}, {}))
                radii[result.level], models[label] = pretty_eps(result), None
        columns = list(dict.fromkeys(key for own, _, _ in ways.values() for key in own))
        everybody = {label for label, _ in self.results}
        rows = []
        for own, radii, models in ways.values():
            row = [setting(key, own.get(key, "")) for key in columns]
            row.append(", ".join(text for _, text in sorted(radii.items())))
            rows.append([*row, "all" if set(models) == everybody else ", ".join(models)])
        return [*map(words, columns), "radii", "models"], rows

    @property
    def notes(self) -> list[str]:
        """What a reader has to know besides."""
        found, results = [], [result for _, result in self.results]
        if self.result.metric == "targeted_success":
            found.append(
                "The numbers are the shares of images that resist: the attacker's target is not said on them."
            )
        left_out = sorted({name for result in results for name in result.left_out})
        if left_out:
            why = "were not asked for" if self.result.task == "corruption" else "are not defined for so few classes"
            found.append(f"Left out, because they {why}: {', '.join(left_out)}.")
        for level in sorted({result.level for result in results}):
            here = [result for result in results if result.level == level]
            if len({str([_settings(attack) for attack in result.attacks]) for result in here}) > 1:
                found.append(f"The models were not attacked alike at {pretty_eps(here[0])}; see the table of attacks.")
        return found


def _settings(attack: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in attack.items() if key not in _NO_SETTINGS and value is not None}
