"""Numbers and their files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hf_robust_vision.evaluation.results import (
    RobustnessResult,
    SampleRecord,
    add_results,
    check_results_file,
    load_results,
    load_samples,
    save_results,
    summarize_hits,
    summarize_scores,
    tracked_metrics,
    wilson_interval,
)
from hf_robust_vision.files import write_atomically


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


def summarize(records):
    return summarize_hits([record.clean_hit for record in records], [record.robust_hit for record in records])


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
    for of in (summarize, summarize_scores):
        with pytest.raises(ValueError, match="nothing was measured"):
            of([])


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


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["report/robustness.json", "results/sim_clip_demo.json", "results/swap_llava.json"])
def test_files_of_earlier_versions_are_read_for_ever(name, tmp_path):
    """Schema 1, written before any field was checked; written again and read, it is the same."""
    results = load_results(DOCS / name)
    assert len(results) == len(json.loads((DOCS / name).read_text())["results"]) > 0
    assert load_results(save_results(results, tmp_path)) == results


def test_severity_of_earlier_versions_gets_its_field(tmp_path):
    """They kept it in eps, under a norm of that name."""
    path = save_results([result()], tmp_path)
    content = json.loads(path.read_text())
    old = content["results"][0] | {"task": "corruption", "norm": "severity", "eps": 3.0}
    del old["severity"], old["carry"]
    path.write_text(
        json.dumps(content | {"results": [old, old | {"task": "zero_shot", "protocol": "tecoa", "norm": "l2"}]})
    )
    corruption, tecoa = load_results(path)
    assert (corruption.norm, corruption.eps, corruption.severity, corruption.carry) == ("none", 0.0, 3, True)
    assert (corruption.threat, corruption.level, corruption.robust_name) == (
        "severity 3",
        3,
        "robust_accuracy_severity_3",
    )
    assert not tecoa.carry  # the only protocol of theirs that carried nothing over
    add_results([result(task="corruption", norm="none", eps=0.0, severity=n) for n in (2, 3)], tmp_path)
    assert [row.severity for row in load_results(path)] == [None, 2, 3]


WRONG = {
    "clean_accuracy": ("x", None, True, math.nan, math.inf, -0.1, 1.5),
    "robust_accuracy": (5.25, [0.5], math.nan),
    "ci95": ({}, {"clean_accuracy": [0.3, 0.95]}, {"clean_accuracy": [0.3], "robust_accuracy": [0.1, 0.2]}, None),
    "num_samples": (0, -3, 2.5, "4"),
    "eps": (-0.1, 4, math.nan, "4/255"),
    "task": (None, 3),
    "attacks": (None, {}, [3], [{}], [{"name": 3}]),
    "class_names": ("cat", [1], None),
    "severity": (1.5, "3"),
    "samples": ("../samples.jsonl", "/etc/hostname", "a/b", "", ".."),
    "images": ("../images",),
    "training": ([], "Sim-CLIP"),
    "versions": ({"torch": 2},),
    "seconds": (None, math.nan),
    "carry": (None, 1),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_field_that_can_not_be_is_named(name, value, tmp_path):
    """findings-reliability 11, findings-swap 12: the file, the result and the field, in one line."""
    path = tmp_path / "robustness.json"
    rows = [result().to_dict(), result().to_dict() | {name: value}]
    path.write_text(json.dumps({"schema": 1, "results": rows}))
    with pytest.raises(ValueError, match=rf"robustness.json: result 2: .*{name.replace('attacks', 'attack')}"):
        load_results(path)
    with pytest.raises(ValueError, match="result 2"):
        check_results_file(tmp_path)
    with pytest.raises(ValueError, match="result 2"):
        add_results([result()], tmp_path)
    assert len(json.loads(path.read_text())["results"]) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"schema": 1}', '{"schema": 1, "results": null}',
                                     '{"schema": 1, "results": {}}', '{"schema": 1, "results": [3]}',
                                     '{"schema": 1, "results": [{}]}', "[" * 100_000, b"\xff\xfe"], ids=range(12))  # fmt: skip
def test_what_is_no_file_of_results_is_named(content, tmp_path):
    """findings-reliability 11."""
    check_results_file(tmp_path)  # none there, none wrong
    path = tmp_path / "robustness.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (load_results, check_results_file):
        with pytest.raises(ValueError, match=r"robustness\.json"):
            read(tmp_path)


def test_a_missing_field_is_named(tmp_path):
    row = result().to_dict()
    del row["eps"]
    (tmp_path / "robustness.json").write_text(json.dumps({"schema": 1, "results": [row]}))
    with pytest.raises(ValueError, match=r"robustness\.json: result 1: eps is missing"):
        load_results(tmp_path)


def test_what_is_not_finite_is_written_as_null(tmp_path):
    """A sanity check may have seen a gradient that is none; a number of JSON it is not."""
    sanity = {"checks": [{"numbers": {"median_norm": math.nan, "zero": [math.inf, 0.5]}}]}
    path = save_results([result(sanity=sanity)], tmp_path)
    assert load_results(path)[0].sanity == {"checks": [{"numbers": {"median_norm": None, "zero": [None, 0.5]}}]}
    assert "NaN" not in path.read_text()


LINE = {"id": 1, "label": 2, "clean": 2, "adversarial": 0, "score": 0.5, "fooled_by": "apgd-ce"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"\xff", "not UTF-8"),
        (b"{", "line 2 is not JSON"),
        (b"", "line 2 is not JSON"),
        (b"[1]", "line 2: a SampleRecord must be a JSON object"),
        (LINE | {"id": [1]}, r"line 2: id must be int \| str, got \[1\]"),
        (LINE | {"id": None}, "line 2: id"),
        (LINE | {"fooled_by": 17}, r"line 2: fooled_by must be str \| None, got 17"),
        (LINE | {"label": {}}, "line 2: label"),
        (LINE | {"label": True}, "line 2: label"),
        (LINE | {"score": "high"}, "line 2: score"),
        (LINE | {"score": math.nan}, "line 2: score"),
        ({"id": 1, "label": 2}, "line 2: clean is missing"),
        (LINE | {"id": 0, "fooled_by": None}, "line 2 says something else about sample 0"),
    ],
    ids=range(13),
)
def test_a_line_that_is_no_record_is_named(line, said, tmp_path):
    """findings-reliability 12: file and line."""
    path = tmp_path / "samples-x.jsonl"
    last = line if isinstance(line, bytes) else json.dumps(line).encode()
    path.write_bytes(json.dumps(LINE | {"id": 0}).encode() + b"\n" + last + b"\n")
    with pytest.raises(ValueError, match=rf"samples-x\.jsonl.*{said}"):
        load_samples(path)


def test_a_line_that_stands_twice_counts_once(tmp_path):
    path = tmp_path / "samples-x.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{json.dumps(LINE | {'later': 1})}\n")
    assert load_samples(path) == [SampleRecord(**LINE)]


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
