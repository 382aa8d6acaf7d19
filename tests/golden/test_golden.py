"""The demo gives what is written down in `golden.json`, sample by sample and update by update."""

from __future__ import annotations

import json

import pytest

from .scenes import SCENES
from .write import FLOAT32, GOLDEN, TOLERANCES, changed, dumps, load, same


LONG = ("losses", "sanity")  # half of the time of all


@pytest.mark.parametrize("scene", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in SCENES])
def test_the_demo_gives_the_same(scene):
    old, new = load()[scene], json.loads(json.dumps(SCENES[scene]()))
    rows = changed(scene, old, new)
    assert not rows, "\n".join(f"{name}\n  was {old.get(name)}\n  is  {new.get(name)}" for name in rows)


def test_the_data_are_small_and_as_the_writer_writes_them():
    golden = load()
    assert golden.keys() == SCENES.keys()
    assert GOLDEN.read_text(encoding="utf-8") == dumps(golden)
    assert GOLDEN.stat().st_size < 300_000


def test_every_flag_is_seen_both_ways():
    """Data in which every sample falls, or none, would not notice much."""
    golden = load()
    for scene in golden.keys() - {"sanity", "losses"}:
        samples = [row for rows in golden[scene].values() for row in rows.values() if isinstance(row, dict)]
        blamed = {row.get("fooled_by") for row in samples if {"adversarial", "score", "fooled_by"} & row.keys()}
        assert None in blamed, scene
        assert blamed - {None, "clean"}, scene
    assert {row["verdict"] for row in golden["sanity"].values()} == {"passed", "flagged", "not run"}


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"score": 0.5, "fooled_by": "a"}, {"score": 0.50009, "fooled_by": "a"}, True),
        ({"score": 0.5, "fooled_by": "a"}, {"score": 0.5002, "fooled_by": "a"}, False),
        ({"score": 0.5, "fooled_by": "a"}, {"score": 0.5, "fooled_by": "b"}, False),
        ({"score": 0.5, "fooled_by": "a"}, {"score": 0.5}, False),
        ([1.0, 2.0], [1.0], False),
        (3, 4, False),
        (0.5, None, False),
        (float("nan"), float("nan"), False),
    ],
)
def test_what_counts_as_the_same(one, other, equal):
    assert same(one, other, FLOAT32) == equal


def test_losses_are_compared_as_float64():
    assert changed("losses", {"tecoa": [3.0]}, {"tecoa": [3.0 + 1e-10]}) == []
    assert changed("losses", {"tecoa": [3.0], "fare": [1.0]}, {"tecoa": [3.0 + 1e-7]}) == ["fare", "tecoa"]
    assert TOLERANCES["losses"]["abs_tol"] == 0
