"""Numbers are sums over their records, and radii do not contradict each other (findings-reliability 12)."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from hf_robust_vision.evaluation.consistency import check_attacked, check_results, check_samples
from hf_robust_vision.evaluation.results import SampleRecord, summarize_hits, summarize_scores
from tests.evaluation.test_results import result, summarize


RECORDS = [
    SampleRecord(0, 1, 1, 1, -0.5),
    SampleRecord(1, 0, 0, 1, 0.5, "apgd-ce"),
    SampleRecord(2, 1, 0, fooled_by="clean"),
]


def of(records, **changes):
    return result(**(summarize(records) | changes))


def changed(place, **fields):
    return [replace(record, **fields) if n == place else record for n, record in enumerate(RECORDS)]


def test_records_of_every_task():
    check_samples(of(RECORDS), RECORDS)
    ranks = [SampleRecord(0, 0, 0, 3, fooled_by="apgd-nll@1"), SampleRecord(1, 0, 2, 7, fooled_by="clean")]
    recall = {"task": "retrieval", "metric": "image_to_text_recall@5", "attacks": [{"name": "apgd-nll@1"}]}
    check_samples(result(**recall, **summarize_hits([True, True], [True, False])), ranks)
    captions = [SampleRecord(0, "a\nb", "a", "c", 0.25, "pgd", 1.0), SampleRecord(1, "a", "a", None, 0.5, None, 0.5)]
    caption = {"task": "caption", "metric": "chrF2", "attacks": [{"name": "pgd"}]}
    check_samples(result(**caption, **summarize_scores(captions)), captions)
    corrupted = [SampleRecord(f"{name}/0", 1, 0, 1) for name in ("fog", "snow")]
    severity = {"task": "corruption", "norm": "none", "eps": 0.0, "severity": 3}
    severity |= {"attacks": [{"name": "fog"}, {"name": "snow"}]}
    check_samples(result(**severity, **summarize_hits([False], [True])), corrupted)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (RECORDS[:2], "should hold 3 samples, it holds 2"),
        (changed(0, fooled_by="somebody"), "sample 0 was fooled by 'somebody', which is no attack of it"),
        (changed(0, label=0), "sample 0 of class 0 was taken for 1, and not lost"),
        (changed(2, label=0), "sample 2 of class 0 was taken for 0, and lost"),
        (changed(0, label="cat"), r"sample 0 must hold whole numbers under 2, got \['cat', 1, 1\]"),
        (changed(0, label=7), "sample 0 must hold whole numbers under 2"),
        (changed(1, adversarial=-1), "sample 1 must hold"),
        (changed(1, fooled_by=None), r"give a robust_accuracy of 0\.666667, the result says 0\.333333"),
        (changed(2, clean=1, fooled_by="apgd-ce"), "give a clean_accuracy of 1, the result says 0.666667"),
    ],
    ids=range(9),
)
def test_records_that_a_result_is_no_sum_of(records, said):
    with pytest.raises(ValueError, match=rf"after on tiny \(apgd-ce, linf 4/255\).*{said}"):
        check_samples(of(RECORDS), records)


def write(folder, *columns, digest="0a1b2c3d", **changes):
    """One result a radius, each with its records."""
    results = []
    for place, records in enumerate(columns):
        path = folder / f"samples-m-eps{(place + 1) / 255:.5f}-{digest}.jsonl"
        path.write_text("".join(f"{json.dumps(asdict(record))}\n" for record in records))
        results.append(of(records, eps=(place + 1) / 255, samples=path.name, **changes))
    return results


def test_a_sample_that_fell_in_the_smaller_ball_has_fallen_in_the_larger(tmp_path):
    risen = changed(1, adversarial=0, fooled_by=None)
    check_results(write(tmp_path, risen, RECORDS), tmp_path)
    results = write(tmp_path, RECORDS, risen)
    with pytest.raises(ValueError, match=r"eps0.00784-.* and .*eps0.00392-.*: sample 1 fell at the smaller radius"):
        check_results(results[::-1], tmp_path)
    check_results(write(tmp_path, RECORDS, risen, carry=False), tmp_path)
    check_results([results[0], replace(results[1], model_sha256="f" * 64)], tmp_path)  # another model's


def test_radii_are_of_the_same_samples(tmp_path):
    other = [replace(record, id=record.id + 1) for record in RECORDS]
    with pytest.raises(ValueError, match="say different things about the clean sample 1"):
        check_results(write(tmp_path, RECORDS, other), tmp_path)


def test_other_samples_or_attacks_may_be_measured_into_one_folder(tmp_path):
    """What was not measured together need not agree: fewer samples, other prompts, weaker attacks."""
    risen = changed(1, adversarial=0, fooled_by=None)
    few, more = write(tmp_path, RECORDS[:2])[0], write(tmp_path, RECORDS, risen, digest="ffffffff")[1]
    check_results([few, more], tmp_path)


def test_files_that_are_not_there_are_not_missed(tmp_path):
    assert check_results([of(RECORDS, samples="samples-gone.jsonl"), of(RECORDS)], tmp_path) == {}
    with pytest.raises(ValueError, match="no step of pgd"):
        check_results([of(RECORDS, attacks=[{"name": "pgd", "steps": 0}])], tmp_path)


def test_what_has_no_radius_needs_no_attack():
    check_attacked(of(RECORDS, eps=0.0, attacks=[{"name": "pgd", "steps": 0}]))
    check_attacked(of(RECORDS, norm="none", eps=0.0, severity=3, attacks=[{"name": "fog"}]))
