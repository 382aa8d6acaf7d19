"""What a table will cost, said before: a few updates and attacks are timed."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from compare_run import make_trainer
from compare_transfer import Comparison
from transfer import Row
from transfer_checks import check

from hf_robust_vision.data.splits import seeded_subset
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.tasks import ZeroShot
from hf_robust_vision.pipeline.estimate import seconds_of_a_pass
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import make_text_bank


TIMED_UPDATES, TIMED_IMAGES, TIMED_CHECKS = 3, 100, 4


def estimate(comparison: Comparison, *, choosing: bool) -> dict[str, float]:
    """Processor hours of each part: a few updates and attacks are timed; a measurement is at most as dear.

    Of measurements this is a bound at the clean accuracy of the original: an image that has fallen is not attacked
    again, and a method that gains clean accuracy has more of them to attack.
    """
    hardened = [row for row in comparison.table.rows if row.method]
    ours = [row for row in hardened if row.ours]
    models = len(comparison.table.test.seeds) * (
        len(hardened) - (max(len(ours) - 1, 0) if comparison.table.compete else 0)
    )
    per_pass = _seconds_per_pass(comparison, max(hardened, key=comparison.cost))
    parts = {
        "training": models * comparison.table.training.passes * per_pass,
        "measuring": (1 + models) * _seconds_of_measuring(comparison, choosing=False),
        "sanity checks": models / len(comparison.table.test.seeds) * _seconds_of_checks(comparison, hardened[0]),
    }
    if choosing:
        data = comparison.table.benchmark
        tried = [comparison.run(row, 0, 1, rate, chosen_on=data) for row in hardened for rate in comparison.rates(row)]
        towers = len({run.tower for run in tried})  # rows that differ in their weight alone share theirs
        measured = 1 + towers + sum(len(row.weights) - 1 for row in hardened)
        parts["choice"] = towers * comparison.table.choice.passes * per_pass
        parts["choice"] += measured * _seconds_of_measuring(comparison, choosing=True)
    return {part: seconds / 3600 for part, seconds in parts.items()}


def _seconds_per_pass(comparison: Comparison, row: Row) -> float:
    with tempfile.TemporaryDirectory() as folder:
        run = replace(comparison.run(row, 0, TIMED_UPDATES, 1e-6), root=Path(folder))
        trainer = make_trainer(run)
        start = time.process_time()
        trainer.train()
        return (time.process_time() - start) / (TIMED_UPDATES * comparison.cost(row))


def _seconds_of_measuring(comparison: Comparison, *, choosing: bool) -> float:
    """At most, of the original on all sets."""
    measuring = (comparison.table.choice if choosing else comparison.table.test).measuring()
    encoder, total = load_encoder(comparison.table.benchmark.checkpoint), 0.0
    for part in comparison.table.benchmark.measured(measuring.split, encoder.transform).values():
        images = min(measuring.images, len(part))
        part = seeded_subset(part, TIMED_IMAGES, seed=0)
        bank = make_text_bank(
            encoder,
            load_tokenizer(comparison.table.benchmark.checkpoint),
            part.class_names,
            get_templates(comparison.table.benchmark.templates),
        )
        task = ZeroShot(encoder, bank, part)
        how, _ = task.fit(measuring.how())
        levels = task.levels(how)
        steps = sum(stage.attack.steps * stage.attack.restarts for level in levels for stage in level.stages)
        with torch.no_grad():
            answers = task.logits(torch.stack([item["images"] for item in part])).argmax(1)
        right = (answers == torch.tensor(part.labels())).double().mean().item()
        total += images * right * steps * seconds_of_a_pass(task, levels, time.process_time)
    return total


def _seconds_of_checks(comparison: Comparison, row: Row) -> float:
    how = replace(comparison.table.sanity, samples=TIMED_CHECKS)
    with tempfile.TemporaryDirectory() as folder:
        run = replace(comparison.run(row, 0, 1, 1e-6), root=Path(folder), method=Row("", "").make())
        seconds = check(run, how=how)["cpu_seconds"]
    return float(seconds) * comparison.table.sanity.samples / TIMED_CHECKS
