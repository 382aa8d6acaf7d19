"""Numbers and their files."""

from __future__ import annotations

import json
import math

import pytest

from hf_robust_vision.evaluation.results import (
    RobustnessResult,
    SampleRecord,
    load_results,
    save_results,
    summarize,
    tracked_metrics,
    wilson_interval,
    write_atomically,
)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (0, 20, 0.0, 0.1611),  # the next four: Newcombe 1998, table I, method 3
        (1, 29, 0.0061, 0.1718),
        (15, 148, 0.0624, 0.1605),
        (81, 263, 0.2553, 0.3662),
        (20, 20, 0.8389, 1.0),
        (5, 10, 0.2366, 0.7634),
    ],
)
def test_wilson(hits, count, low, high):
    assert wilson_interval(hits, count) == pytest.approx((low, high), abs=5.1e-5)


def test_wilson_of_nothing():
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_summary_counts_samples():
    records = [
        SampleRecord(0, 1, 1),  # right and robust
        SampleRecord(1, 1, 1, adversarial=0, fooled_by="apgd-ce"),
        SampleRecord(2, 1, 0, fooled_by="clean"),
        SampleRecord(3, 1, 1, adversarial=1),
    ]
    summary = summarize(records)
    assert (summary["num_samples"], summary["clean_accuracy"], summary["robust_accuracy"]) == (4, 0.75, 0.5)
    assert summary["ci95"]["clean_accuracy"] == list(wilson_interval(3, 4))
    assert summary["ci95"]["robust_accuracy"] == list(wilson_interval(2, 4))
    assert math.isnan(summarize([])["clean_accuracy"])


def result(**changes):
    values = {
        "task": "zero_shot", "model": "after", "model_sha256": "0" * 64, "dataset": "tiny", "split": "test",
        "num_samples": 4, "clean_accuracy": 0.75, "robust_accuracy": 0.5, "protocol": "apgd-ce", "eps": 4 / 255,
        "norm": "linf", "attacks": [{"name": "apgd-ce", "steps": 5, "restarts": 1}],
        "ci95": {"clean_accuracy": [0.3, 0.95], "robust_accuracy": [0.15, 0.85]}, "class_names": ["kräuter", "b"],
    }  # fmt: skip
    return RobustnessResult(**(values | changes))


def test_round_trip(tmp_path):
    results = [result(), result(model="before", training={"method": "Sim-CLIP"}, eps=0.0)]
    path = save_results(results, tmp_path / "new")
    assert load_results(path) == load_results(tmp_path / "new") == results
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["schema"] == 1
    wanted = {
        "task", "model", "model_sha256", "dataset", "split", "group", "num_samples", "class_names", "templates",
        "metric", "clean_accuracy", "robust_accuracy", "ci95", "protocol", "eps", "norm", "attacks", "training",
        "generation", "sanity", "samples", "seconds", "versions",
    }  # fmt: skip
    assert all(wanted <= set(row) for row in content["results"])


def test_names_that_are_no_text_come_back(tmp_path):
    """A folder's name may hold bytes that are no UTF-8 (findings-reliability 4 and 13: it must not cost the results)."""
    save_results([result(class_names=["undecodable \udcff", "\x00"])], tmp_path)
    assert load_results(tmp_path)[0].class_names == ["undecodable \udcff", "\x00"]


def test_newer_fields_are_left_out_and_other_schemas_refused(tmp_path):
    path = save_results([result()], tmp_path)
    content = json.loads(path.read_text(encoding="utf-8"))
    content["results"][0]["invented_later"] = 1
    path.write_text(json.dumps(content))
    assert load_results(path) == [result()]
    path.write_text(json.dumps(content | {"schema": 2}))
    with pytest.raises(ValueError, match="schema 2, this version reads 1"):
        load_results(path)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    write_atomically(path, "new")
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == ["file"]
    assert path.read_text() == "new"


def test_names_for_trackers():
    """One name a radius and norm: two that met would overwrite each other's number."""
    results = [
        result(model="before", robust_accuracy=0.1),
        result(eps=0.5 / 255, robust_accuracy=0.6),
        result(),
        result(eps=3.5, norm="l2", robust_accuracy=0.2),
    ]
    assert tracked_metrics(results) == {
        "test_before_clean_accuracy": 0.75, "test_before_robust_accuracy_4_255": 0.1, "test_clean_accuracy": 0.75,
        "test_robust_accuracy_0.5_255": 0.6, "test_robust_accuracy_4_255": 0.5, "test_robust_accuracy_l2_3.5": 0.2,
    }  # fmt: skip
