"""Results in the form that the Hub reads beside the card: `.eval_results/*.yaml`, one file a data set of the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.report.tables import counted, point, words


EVAL_FOLDER = ".eval_results"
PREFIX = "robustness-"  # of the files that are ours
_STRENGTH = ("steps", "restarts", "queries")  # of an attack, as its row has them


def eval_files(results: Sequence[RobustnessResult]) -> dict[str, bytes]:
    """Content by path, for the results of data sets that are on the Hub; nothing where none is.

    Clean accuracy stands once per data set, robust accuracy once per radius. Each has a `task_id` of its own, for a
    leaderboard that mixed two radii would compare what can not be compared; protocol, attacks and interval are in the
    notes. The Hub shows them where the data set is registered as a benchmark that has such a task.
    """
    found: dict[str, dict[tuple[Any, ...], EvalResultEntry]] = {}
    for result in results:
        if result.dataset_id is not None:
            place = f"{EVAL_FOLDER}/{PREFIX}{result.dataset_id.replace('/', '--')}.yaml"
            for entry in _entries(result):
                # Two protocols at one radius are two entries; the clean accuracy is one, whatever was attacked.
                found.setdefault(place, {}).setdefault((entry.task_id, entry.notes), entry)
    return {
        place: yaml.safe_dump(
            eval_result_entries_to_yaml(list(entries.values())), sort_keys=False, allow_unicode=True, width=119
        ).encode()
        for place, entries in found.items()
    }


def _entries(result: RobustnessResult) -> Iterator[EvalResultEntry]:
    metric = result.metric.replace(" ", "_")
    rest = "" if result.group == "all" else f"_{result.group}"
    shared = f"{counted(result.num_samples, 'sample')} of {result.split}"
    told: list[tuple[str, str, str]] = [("clean", f"clean_{metric}", "clean images, no attack")]
    if result.attacks and result.level > 0:
        task = result.robust_name.replace("accuracy", metric, 1)
        told.append(("robust", task, f"{result.threat}, protocol {result.protocol}: {_attacks(result.attacks)}"))
    for kind, task, notes in told:
        yield EvalResultEntry(
            dataset_id=str(result.dataset_id),
            task_id=f"{result.task}_{task}{rest}",
            value=round(getattr(result, f"{kind}_accuracy"), 6),
            notes=f"{words(result.metric)}, {notes}; {shared}; 95 % interval {_interval(result, kind)}",
        )


def _attacks(rows: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{row['name']} ({_strength(row)})" if _strength(row) else str(row["name"]) for row in rows)


def _strength(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {row[key]}" for key in _STRENGTH if row.get(key))


def _interval(result: RobustnessResult, kind: str) -> str:
    at = point(result, kind)
    return f"{at.low:.3f} to {at.high:.3f}"
