"""The time to robustness: a real training by a clock that counts updates, and what is made of its points."""

from __future__ import annotations

import importlib
from itertools import count

import pytest

from hf_robust_vision.training.overfitting import CatastrophicOverfittingError
from tests.conftest import make_dataset


SETTINGS = ("2 steps", "1 step on half of the tokens, then 2 on all")


@pytest.fixture
def recipe():
    return importlib.import_module("benchmark_robustness")


@pytest.fixture
def race(recipe, clip_folder, tmp_path):
    ticks = count()

    def clock():
        return next(ticks)

    def load(transform):
        return make_dataset(24), make_dataset(9, "validation", 100)

    task = recipe.Task("tiny", str(clip_folder), "demo", 1 / 255, load, "tiny")
    return recipe.Race(task, 20, 6, 1e-4, output_dir=tmp_path / "runs", clock=clock)


def test_a_table_is_measured_once(recipe, race, monkeypatch):
    """Each update takes a second, so five points in 20 s are every fourth update, and a quarter of it every update or two."""
    lines = recipe.robustness_table(race, SETTINGS, [0])
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:5]] == [recipe.PUBLISHED, *SETTINGS]
    assert [line.split(" | ")[1] for line in lines[2:4]] == ["24.0", "8.0"]
    assert len(list(race.output_dir.glob("*.json"))) == 3
    published = race.run(recipe.PUBLISHED, 0, 20, None)
    assert [point.updates for point in published.points] == [4, 8, 12, 16, 20]
    monkeypatch.setattr(recipe, "train", lambda *run: pytest.fail("it was trained again"))
    assert recipe.robustness_table(race, SETTINGS, [0]) == lines


def test_a_run_that_is_stopped_is_a_row(recipe, race, monkeypatch):
    class Blinded(recipe.SimCLIPTrainer):
        def training_step(self, *args):
            if self.state.global_step == 2:
                raise CatastrophicOverfittingError("blinded")
            return super().training_step(*args)

    monkeypatch.setattr(recipe, "SimCLIPTrainer", Blinded)
    run = recipe.train(race, "2 steps", 0, 5, 2.0)
    assert run.stopped == "blinded"
    assert [point.updates for point in run.points] == [1, 2]
    assert "| stopped |" in recipe.table({"2 steps": run}, 2.0)[-1]


def made(recipe, name, seed, *points, stopped=None):
    return recipe.Run(name, seed, 8.0, tuple(recipe.Point(*point) for point in points), stopped)


def test_the_soonest_keeps_clean_accuracy(recipe):
    runs = {
        "late": made(recipe, "late", 0, (30, 3, 0.9, 0.4), (60, 6, 0.9, 0.6)),
        "unclean": made(recipe, "unclean", 0, (20, 2, 0.88, 0.7)),
        "soon": made(recipe, "soon", 0, (20, 2, 0.9, 0.4), (40, 4, 0.895, 0.5)),
        "never": made(recipe, "never", 0, (10, 2, 0.9, 0.4)),
    }
    assert recipe.soonest(runs, 0.5, 0.9) == "soon"
    assert recipe.soonest(runs, 0.8, 0.9) is None
    rows = recipe.table(runs, 0.5)[2:]
    assert [row.split(" | ")[2] for row in rows] == ["60", "20", "40", "not in 10"]


def test_the_verdict_is_seed_by_seed(recipe):
    slow = [made(recipe, "p", seed, (120, 9, 0.9, 0.3), (600, 45, 0.9, 0.5)) for seed in (0, 1)]
    fast = [made(recipe, "f", 0, (60, 9, 0.89, 0.5)), made(recipe, "f", 1, (75, 9, 0.9, 0.52))]
    lines = recipe.verdict("f", slow, fast)
    assert lines[-1] == "f is 9.0 times as soon (8.0 to 10.0); clean accuracy is lower by 0.5 points in the mean."
    lost = [fast[0], made(recipe, "f", 1, (75, 9, 0.9, 0.4))]
    assert recipe.verdict("f", slow, lost)[-1] == "f reached it with 1 of 2 seeds."
    assert "| not in 75 |" in "\n".join(recipe.verdict("f", slow, lost))
