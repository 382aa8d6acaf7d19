"""The phases of `compare.py --config`: what is chosen on validation photos, what is measured on test.

A choice is written to `docs/results/NAME-choice.json` and fixed there: a table takes learning rates and weights from it,
and refuses to measure a row that was chosen with other options.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from compare_run import Run, arguments, harden, perform
from margins import pearson
from passes import passes_of, text_work, updates_for
from pool import perform_all
from transfer import Row, Table
from transfer_checks import check, cross_check
from transfer_data import Transfer
from transfer_scores import Hits, accuracy, challenges, hits_of, leads, left_by, pairs, score, shares

from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.results import (
    RobustnessResult,
    eps_text,
    pretty_eps,
    source_hash,
    versions,
)
from hf_robust_vision.methods.classes import cosines
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import class_embeddings, class_prompts


T = TypeVar("T")


class Comparison:
    """A table that is being made.

    Args:
        table: What it is.
        root: Folder of the runs; what lies there is read back.
        jobs: Processes.
    """

    def __init__(self, table: Table, root: Path, jobs: int):
        self.table, self.root, self.jobs = table, root, jobs
        self.source = source_hash()  # of the code as it starts, whatever is edited meanwhile
        self.methods = {row.key: row.make() for row in table.rows}
        encoder = load_encoder(table.benchmark.checkpoint)
        names = table.benchmark.training_images(encoder.transform).class_names
        self.prompts = class_prompts(names, get_templates(table.benchmark.templates))
        self.text_work = text_work(encoder, load_tokenizer(table.benchmark.checkpoint), self.prompts)
        self.sha256 = weights_sha256(encoder)

    def cost(self, row: Row) -> float:
        """Passes of an update of a row, 0 of the original."""
        if row.method is None:
            return 0.0
        found = passes_of(self.methods[row.key].trainer, arguments(self.run(row, 0, 1, 1e-3)))  # type: ignore[arg-type]
        return found.cost(self.table.training.batch_size, len(self.prompts), self.text_work)

    def run(
        self,
        row: Row,
        seed: int,
        steps: int,
        rate: float,
        *,
        weight: float = 1.0,
        chosen_on: Transfer | None = None,
    ) -> Run:
        """One run of a row: measured on test photos, or on the validation photos of what something is chosen on."""
        table = self.table
        measuring = (table.choice if chosen_on else table.test).measuring()
        data, budget = chosen_on or table.benchmark, table.budget(steps, rate)
        return Run(self.methods[row.key], seed, budget, measuring, data, self.root, self.source, weight)

    def steps(self, row: Row, passes: float) -> int:
        """Updates of a row that so many passes pay for."""
        return updates_for(passes, self.cost(row)) if row.method else 0

    def rates(self, row: Row) -> tuple[float, ...]:
        """Learning rates that are tried; of the original none."""
        if row.method is None:
            return (0.0,)
        return row.learning_rates or self.table.choice.learning_rates

    def perform(self, runs: Sequence[Run]) -> dict[Run, list[RobustnessResult]]:
        """Train, then measure; what several runs share, such as a tower at several weights, is done once."""
        self._train(runs)
        first = {run.folder: run for run in reversed(runs)}
        found = self._all(perform, list(reversed(first.values())), lambda run, results: _numbers(results))
        return {run: found[first[run.folder]] for run in runs}

    def _train(self, runs: Sequence[Run]) -> None:
        """The towers that are not there yet."""
        towers = {run.tower: run for run in reversed(runs) if run.method.trainer}
        missing = [run for tower, run in reversed(towers.items()) if not (tower / "training.json").is_file()]
        self._all(harden, missing, lambda run, record: f"{record['cpu_seconds']:.0f} CPU s")

    def _all(self, do: Callable[[Run], T], runs: Sequence[Run], numbers: Callable[[Run, T], str]) -> dict[Run, T]:
        return perform_all(do, runs, self.jobs, _label, numbers) if runs else {}

    # Choosing

    def choice_settings(self) -> dict[str, Any]:
        """What rows that are compared with each other have to share."""
        seed = {"seed": self.table.test.seeds[0]}
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self.table.choice) | asdict(self.table.training) | seed))
        plain.pop("unseen")
        return plain | {"passes": self.table.choice.passes}

    def choose(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """What is chosen for the rows, by the name of the choice; of ours on classes held out, if the file wants that.

        Beside ours some rows are measured on those classes at what was chosen for them, here or earlier (`choices`).
        """
        usual, apart = self.table.choices
        kinds = {
            name: [row for row in self.table.rows if self.table.chosen_as(row) == name] for name in (usual, apart)
        }
        found = {}
        if kinds[usual]:
            found[usual] = self._choose({row: self.rates(row) for row in kinds[usual]}, self.table.benchmark)
        if kinds[apart] and (unseen := self.table.choice.unseen):
            known = choices.get(usual, {"rows": {}})["rows"] | found.get(usual, {"rows": {}})["rows"]
            rows: dict[Row, tuple[float, ...]] = {
                row: self.rates(row) if row.method is None else (known[row.key]["learning_rate"],)
                for row in self.table.rows
                if row.method is None or (row.key in unseen.beside and row.key in known)
            }
            rows |= {row: self.rates(row) for row in kinds[apart]}
            found[apart] = self._choose(rows, replace(self.table.benchmark, unseen=unseen))
            found[apart]["settings"]["unseen"] = json.loads(json.dumps(asdict(unseen)))
        return found

    def _choose(self, rates: Mapping[Row, Sequence[float]], data: Transfer) -> dict[str, Any]:
        """The learning rate of each row, then its weight, by the score on validation photos; then which of ours."""
        seed, rows = self.table.test.seeds[0], list(rates)
        at = {row: self.steps(row, self.table.choice.passes) for row in rows}
        tried = {
            (row, rate): self.run(row, seed, at[row], rate, chosen_on=data) for row in rows for rate in rates[row]
        }
        done = self.perform(list(tried.values()))
        best = {
            row: max((rate for r, rate in tried if r is row), key=lambda rate: score(done[tried[row, rate]]))
            for row in rows
        }
        between = [replace(tried[row, best[row]], weight=w) for row in rows for w in row.weights if w != 1]
        done |= self.perform(between)
        chosen = {
            row.key: self._chosen(row, [run for run in done if run.method is self.methods[row.key]], done)
            for row in rows
        }
        ours = [key for key, entry in chosen.items() if entry["ours"]]
        return {
            "settings": self.choice_settings(),
            "about": _about(done[next(iter(done))]),
            "model_sha256": self.sha256,
            "source": self.source,
            "rows": chosen,
            "ours": max(ours, key=lambda key: chosen[key]["score"], default=None),
            "towers": sorted({_relative(run) for run in done if run.method.trainer}),
            "cpu_hours": (sum(_training_seconds(done)) + sum(_measuring_seconds(done))) / 3600,
        }

    def _chosen(self, row: Row, runs: Sequence[Run], done: Mapping[Run, list[RobustnessResult]]) -> dict[str, Any]:
        tried = [
            {"learning_rate": run.budget.learning_rate, "weight": run.weight, "score": score(done[run])}
            | _shares(done[run])
            for run in runs
        ]
        best = max(tried, key=lambda entry: entry["score"])
        return {
            "label": row.label,
            "ours": row.ours,
            "options": dict(row.options),
            "learning_rate": best["learning_rate"],
            "weight": best["weight"],
            "score": best["score"],
            "tried": tried,
        }

    # Measuring

    def settled(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """What was chosen for the rows of the table, wherever they were chosen; which of ours; at what cost."""
        parts = [choices[name] for name in self.table.choices if name in choices]
        rows = {
            row.key: choices.get(self.table.chosen_as(row), {"rows": {}})["rows"].get(row.key)
            for row in self.table.rows
        }
        where = self.table.choices[self.table.choice.unseen is not None]
        return {
            "rows": rows,
            "ours": choices[where]["ours"] if where in choices else None,
            "towers": {tower for part in parts for tower in part["towers"]},
            "cpu_hours": sum(part["cpu_hours"] for part in parts),
        }

    def runs(self, choices: Mapping[str, Any]) -> dict[Row, list[Run]]:
        """The runs of each row of the table at what was chosen for it; of ours the chosen row, if they are not named.

        Raises:
            ValueError: If something is open that was not chosen, or was chosen with other options.
        """
        found = {}
        choice = self.settled(choices)
        best = choice["ours"] if self.table.compete else None
        for row in self.table.rows:
            if row.ours and best not in (None, row.key):
                continue
            rate, weight = self._settled(row, choice)
            seeds = self.table.test.seeds if row.method else self.table.test.seeds[:1]
            steps = self.steps(row, self.table.training.passes)
            found[row] = [self.run(row, seed, steps, rate, weight=weight) for seed in seeds]
        return found

    def _settled(self, row: Row, choice: Mapping[str, Any]) -> tuple[float, float]:
        rates = self.rates(row)
        if len(rates) == len(row.weights) == 1:
            return rates[0], row.weights[0]
        entry = choice["rows"][row.key]
        if entry is None or entry["options"] != json.loads(json.dumps(dict(row.options))):
            with_other = "" if entry is None else ", only with other options"
            raise ValueError(
                f"nothing was chosen for {row.key}{with_other}; run the same command with --choose first."
            )
        return entry["learning_rate"], entry["weight"]

    def measure(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """Train and measure all rows, check them, and give everything that the page says."""
        choice, runs = self.settled(choices), self.runs(choices)
        done = self.perform([run for each in runs.values() for run in each])
        first = {row: each[0] for row, each in runs.items() if row.method}
        checks = self._all(
            partial(check, how=self.table.sanity), list(first.values()), lambda _, found: found["verdict"]
        )
        fresh = [run for run in done if _relative(run) not in choice["towers"]]
        seconds = {
            "choice": 3600 * choice["cpu_hours"],
            "training": sum(_training_seconds(fresh)),
            "measuring": sum(_measuring_seconds(done)),
            "sanity checks": sum(found["cpu_seconds"] for found in checks.values()),
        }
        some = next(iter(done))
        hits = {row: hits_of([(run, done[run]) for run in each]) for row, each in runs.items()}
        return {
            "title": self.table.title,
            "about": self.table.about,
            **self.table.settings(),
            "attacks": done[some][0].attacks,
            "sanity": asdict(self.table.sanity),
            "sets": self._sets(done[some]),
            "rows": [self._row(row, runs[row], done, hits[row], checks.get(runs[row][0])) for row in runs],
            "paired": (paired := list(pairs(hits, self.table.choice.eps))),
            "leads": leads(paired),
            "challenges": list(challenges(hits, self.table.benchmark.train.name)),
            "lead_eps": [eps_text(eps, "linf") for eps in self.table.choice.eps],
            "cpu_hours": {part: value / 3600 for part, value in seconds.items()},
            "hashes": {"start": self.sha256, "prompts": done[some][0].template_hash, "source": self.source},
            "versions": versions(),
        }

    def _sets(self, results: Sequence[RobustnessResult]) -> list[dict[str, Any]]:
        known = {each.name: each for each in self.table.benchmark.sets}
        first = {result.group: result for result in results}
        return [
            {
                "name": name,
                "split": known[name].split,
                "terms": known[name].terms,
                "num_samples": result.num_samples,
                "classes": len(result.class_names),
                "resolution": result.attacks[0]["resolution"],
            }
            for name, result in first.items()
        ]

    def _row(
        self,
        row: Row,
        runs: Sequence[Run],
        done: Mapping[Run, list[RobustnessResult]],
        hits: Mapping[str, Hits],
        sanity: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        columns = ["clean", *(pretty_eps(result) for result in done[runs[0]] if result.group == next(iter(hits)))]
        lead = ["clean", *(eps_text(eps, "linf") for eps in self.table.choice.eps)]
        return {
            "method": row.key,
            "label": row.label,
            "ours": row.ours,
            "options": dict(row.options),
            "learning_rate": runs[0].budget.learning_rate,
            "weight": runs[0].weight,
            "passes_per_update": self.cost(row),
            "updates": runs[0].budget.steps,
            "seeds": [run.seed for run in runs],
            "sets": {name: {column: accuracy([found[column]]) for column in columns} for name, found in hits.items()},
            "mean": {column: accuracy([found[column] for found in hits.values()]) for column in columns},
            "score": accuracy([found.score(lead) for found in hits.values()]),
            "left": {name: left_by([(run, done[run]) for run in runs], name) for name in hits},
            "sanity": sanity,
            "texts_kept": self._texts_kept(row, runs[0]),
            "cpu_seconds": [
                (result.training or {}).get("cpu_seconds", 0.0) for result in (done[run][0] for run in runs)
            ],
            "model_sha256": [done[run][0].model_sha256 for run in runs],
        }

    def _texts_kept(self, row: Row, run: Run) -> float | None:
        """How far the similarities of the class texts are those of the original: Pearson's correlation over pairs."""
        if row.method != "tima":
            return None
        with torch.no_grad():
            embeds = [
                encoder.encode_prompts(encoder.tokenize(run.tokenizer, self.prompts))
                for encoder in (load_encoder(self.table.benchmark.checkpoint), run.encoder())
            ]
        templates = len(get_templates(self.table.benchmark.templates))
        texts = [class_embeddings(each, templates) for each in embeds]
        upper = torch.triu_indices(len(texts[0]), len(texts[0]), 1)
        return pearson(*(cosines(each, each)[upper[0], upper[1]] for each in texts))

    def cross_check(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """What an independent AutoAttack leaves of some rows, beside what ours does.

        Raises:
            ValueError: If the file asks for none, or for a row that the table has not.
        """
        how = self.table.cross_check
        if how is None:
            raise ValueError("the file has no entry cross_check; wanted set, eps, images and methods.")
        runs = {row.key if not row.ours else "ours": each[0] for row, each in self.runs(choices).items()}
        if stray := [key for key in how.methods if key not in runs]:
            raise ValueError(f"cross_check: {stray[0]} is no row of {self.table.name}, which has {', '.join(runs)}.")
        chosen = [runs[key] for key in how.methods]
        self._train(chosen)
        found = self._all(
            partial(cross_check, how=how),
            chosen,
            lambda _, each: f"ours {100 * each['ours']:.1f} %, theirs {100 * each['theirs']:.1f} %",
        )
        return {
            **asdict(how),
            "eps": eps_text(how.eps, "linf"),
            "table": self.table.settings(),
            "rows": [{"label": run.method.label, "model_sha256": _sha256(run)} | found[run] for run in chosen],
            "versions": versions() | {"pyautoattack": version("pyautoattack")},
        }


def merge_choice(old: Mapping[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """What was chosen now beside the rows of earlier commands that chose in the same way; which of ours, over all."""
    same = ("settings", "model_sha256")
    if old is None or any(new[key] != old[key] for key in same):
        return new
    rows = old["rows"] | new["rows"]
    ours = [key for key, entry in rows.items() if entry["ours"]]
    best = max(ours, key=lambda key: rows[key]["score"], default=None)
    fresh = set(new["towers"]) - set(old["towers"])
    hours = old["cpu_hours"] + (new["cpu_hours"] if fresh else 0.0)
    commands = list(dict.fromkeys([*old["commands"], *new["commands"]]))
    towers = sorted(fresh | set(old["towers"]))
    return new | {"commands": commands, "rows": rows, "ours": best, "towers": towers, "cpu_hours": hours}


def _shares(results: Sequence[RobustnessResult]) -> dict[str, Any]:
    clean, robust = shares(results)
    return {"clean_accuracy": clean, "robust_accuracy": robust}


def _about(results: Sequence[RobustnessResult]) -> dict[str, Any]:
    first = {result.group: result for result in results}
    result = results[0]
    parts = {name: each.num_samples for name, each in first.items()} if len(first) > 1 else {}
    return {
        "dataset": result.dataset,
        "split": result.split,
        "num_samples": result.num_samples,
        "attacks": result.attacks,
    } | ({"parts": parts} if parts else {})


def _numbers(results: Sequence[RobustnessResult]) -> str:
    sets = dict.fromkeys(result.group for result in results)
    words = []
    for name in sets:
        mine = [result for result in results if result.group == name]
        words.append(
            f"{name} {' / '.join(f'{100 * x:.1f}' for x in (mine[0].clean_accuracy, *(r.robust_accuracy for r in mine)))}"
        )
    return ", ".join(words)


def _label(run: Run) -> str:
    between = "" if run.weight == 1 else f", weight {run.weight:g}"
    return f"{run.method.label}, rate {run.budget.learning_rate:g}{between}, seed {run.seed}"


def _sha256(run: Run) -> str:
    return weights_sha256(run.encoder())


def _relative(run: Run) -> str:
    return str(run.tower.relative_to(run.root))


def _training_seconds(runs: Iterable[Run]) -> list[float]:
    towers = {run.tower for run in runs if run.method.trainer}
    return [json.loads((tower / "training.json").read_text())["cpu_seconds"] for tower in towers]


def _measuring_seconds(runs: Iterable[Run]) -> list[float]:
    return [
        json.loads((folder / "measuring.json").read_text())["cpu_seconds"] for folder in {run.folder for run in runs}
    ]
