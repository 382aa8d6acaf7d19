"""What stands of each row of a table: its accuracies with intervals, and how rows differ, paired over images and seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from compare_methods import RIVALS
from compare_run import Run, fooled_by
from comparison import stratified_interval
from torch import Tensor
from transfer import Row

from hf_robust_vision.evaluation.results import RobustnessResult, eps_text, pretty_eps, wilson_interval


LEAD, SLACK = 0.02, 0.01  # what is called a lead: in points of a score that lies in [0, 1]


@dataclass(frozen=True)
class Hits:
    """What stands of one row on one data set: of each column ("clean" or a radius) values of shape (seeds, images)."""

    columns: Mapping[str, Tensor]

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    def score(self, columns: Iterable[str]) -> Tensor:
        """The mean of some columns, image by image."""
        return torch.stack([self.columns[column] for column in columns]).mean(0)


def hits_of(done: Sequence[tuple[Run, list[RobustnessResult]]]) -> dict[str, Hits]:
    """Of each data set, over the seeds of one row."""
    found = {}
    for group in dict.fromkeys(result.group for result in done[0][1]):
        columns: dict[str, list[list[float]]] = {}
        for run, results in done:
            mine = [result for result in results if result.group == group]
            falls = {pretty_eps(result): fooled_by(run, result) for result in mine}
            clean = [float(name != "clean") for name in falls[pretty_eps(mine[0])]]
            columns.setdefault("clean", []).append(clean)
            for eps, names in falls.items():
                columns.setdefault(eps, []).append([float(name is None) for name in names])
        found[group] = Hits({name: torch.tensor(values, dtype=torch.double) for name, values in columns.items()})
    return found


def left_by(done: Sequence[tuple[Run, list[RobustnessResult]]], group: str) -> dict[str, dict[str, float]]:
    """The share of images that stand after each attack, in their order, by radius; mean over the seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for run, results in done:
        for result in results:
            if result.group != group:
                continue
            falls, after = fooled_by(run, result), found.setdefault(pretty_eps(result), {})
            standing = len(falls)
            for name in ("clean", *dict.fromkeys(row["name"] for row in result.attacks)):
                standing -= falls.count(name)
                after.setdefault(name, []).append(standing / len(falls))
    return {eps: {name: statistics.mean(values) for name, values in after.items()} for eps, after in found.items()}


def pairs(hits: Mapping[Row, Mapping[str, Hits]], eps: Sequence[float]) -> Iterable[dict[str, Any]]:
    """Each of ours minus each other hardened row: on the mean over the sets, and on each, of clean and the radii."""
    lead = ["clean", *(eps_text(radius, "linf") for radius in eps)]
    for one in (row for row in hits if row.ours):
        for other in (row for row in hits if row.method and not row.ours):
            apart = {name: hits[one][name].score(lead) - hits[other][name].score(lead) for name in hits[one]}
            over = {"mean": list(apart.values())} | {name: [value] for name, value in apart.items()}
            for name, parts in over.items():
                mean, low, high = stratified_interval(parts)
                row = {"one": one.label, "other": other.label, "set": name}
                yield row | {"difference": mean, "low": low, "high": high}


def challenges(hits: Mapping[Row, Mapping[str, Hits]], trained_on: str) -> Iterable[dict[str, Any]]:
    """TIMA minus each of its rivals at each radius, on the mean over the sets and over those it was not trained on."""
    for one in (row for row in hits if row.method == "tima"):
        for other in (row for row in hits if row.key in RIVALS):
            unseen = [name for name in hits[one] if name != trained_on]
            for sets, names in {"all": list(hits[one]), "unseen": unseen}.items():
                for column in next(iter(hits[one].values())).columns if names else ():
                    apart = [hits[one][name][column] - hits[other][name][column] for name in names]
                    mean, low, high = stratified_interval(apart)
                    row = {"one": one.label, "other": other.label, "sets": sets, "eps": column}
                    yield row | {"difference": mean, "low": low, "high": high}


def leads(paired: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Whether each of ours leads: LEAD above every other on the mean with an interval above 0, no set more than SLACK below.

    `paired` are the differences of `pairs`.
    """
    found = []
    for one in dict.fromkeys(row["one"] for row in paired):
        means = [row for row in paired if row["one"] == one and row["set"] == "mean"]
        sets = [row for row in paired if row["one"] == one and row["set"] != "mean"]
        nearest, worst = (min(rows, key=lambda row: row["difference"]) for rows in (means, sets))
        ahead = nearest["difference"] >= LEAD and all(row["low"] > 0 for row in means)
        found.append(
            {"one": one, "leads": ahead and worst["difference"] >= -SLACK, "nearest": nearest, "worst": worst}
        )
    return found


def score(results: Sequence[RobustnessResult]) -> float:
    """Mean of the clean accuracy and of the robust ones at each radius, over the data sets."""
    clean, robust = shares(results)
    return statistics.mean([clean, *robust.values()])


def shares(results: Sequence[RobustnessResult]) -> tuple[float, dict[str, float]]:
    """Clean accuracy, and the robust one at each radius; data sets weigh alike."""
    first: dict[str, float] = {}
    robust: dict[str, list[float]] = {}
    for result in results:
        first.setdefault(result.group, result.clean_accuracy)
        robust.setdefault(pretty_eps(result), []).append(result.robust_accuracy)
    return statistics.mean(first.values()), {eps: statistics.mean(values) for eps, values in robust.items()}


def accuracy(parts: Sequence[Tensor]) -> dict[str, Any]:
    """Mean over data sets with its 95 % interval, and the value of each seed; `parts` as in `stratified_interval`.

    The interval is the wider of the bootstrap's, over images and seeds, and Wilson's over all images, which stays honest
    where next to none or nearly all of them stand.
    """
    mean, low, high = stratified_interval(parts)
    images = sum(part.shape[1] for part in parts)
    lower, upper = wilson_interval(mean * images, images)
    seeds = torch.stack([part.mean(1) for part in parts]).mean(0).tolist()
    return {"value": mean, "low": min(low, lower), "high": max(high, upper), "seeds": seeds}
