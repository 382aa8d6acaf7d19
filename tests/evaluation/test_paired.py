"""Paired differences: the published interval, and only where the samples are the same."""

from __future__ import annotations

import math
from itertools import product

import pytest

from hf_robust_vision.evaluation.paired import (
    Difference,
    NotPaired,
    compare_samples,
    newcombe_interval,
    paired_difference,
    points,
)
from hf_robust_vision.evaluation.results import SampleRecord, summarize_hits, summarize_scores, wilson_interval
from tests.evaluation.test_results import result, summarize


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        ((20, 12, 2, 16), 0.0562, 0.3292),  # Newcombe 1998, his example, method 10
        ((8, 3, 1, 2), -0.1574, 0.4136),  # Tang et al. 2010, Statistics in Medicine 29
        ((1, 1, 7, 12), -0.507, -0.026),  # Fagerland, Lydersen, Laake 2014, Statistics in Medicine 33
        ((59, 6, 16, 80), -0.1186, -0.0046),  # the same, Statistical Analysis of Contingency Tables, 2017, chapter 8
    ],
)
def test_published_intervals(table, low, high):
    digits = 3 if low == -0.507 else 4
    assert newcombe_interval(*table) == pytest.approx((low, high), abs=0.51 * 10**-digits)


@pytest.mark.parametrize("table", [(20, 12, 2, 16), (0, 5, 0, 0), (3, 0, 0, 4), (7, 1, 9, 0)])
def test_who_is_first_only_turns_the_sign(table):
    both, one, other, neither = table
    low, high = newcombe_interval(both, one, other, neither)
    assert newcombe_interval(both, other, one, neither) == pytest.approx((-high, -low))
    assert newcombe_interval(neither, one, other, both) == pytest.approx(
        (low, high)
    )  # errors are hits of the contrary


def test_degenerate_tables():
    assert newcombe_interval(0, 0, 0, 0) == (-1.0, 1.0)
    low, high = wilson_interval(9, 9)
    assert newcombe_interval(9, 0, 0, 0) == pytest.approx((low - 1, 1 - low))  # no pair parts: still no certainty
    assert newcombe_interval(0, 0, 0, 9) == pytest.approx((low - 1, 1 - low))
    low, high = newcombe_interval(50, 0, 0, 50)
    assert -0.05 < low < 0 < high < 0.05
    low, high = newcombe_interval(0, 9, 0, 0)  # all pairs part
    assert (low, high) == (pytest.approx(1 - math.hypot(*[1 - wilson_interval(9, 9)[0]] * 2)), 1.0)
    for table in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)):
        low, high = newcombe_interval(*table)
        assert -1 <= low < 0 < high <= 1  # one sample tells nothing apart


@pytest.mark.parametrize("chances", [(0.4, 0.2, 0.1, 0.3), (0.6, 0.15, 0.05, 0.2), (0.25, 0.25, 0.25, 0.25)])
def test_it_holds_the_truth_as_often_as_it_says(chances):
    """Over every table of 25 samples, by its exact multinomial probability."""
    count, covered = 25, 0.0
    for both, one, other in product(range(count + 1), repeat=3):
        neither = count - both - one - other
        if neither < 0:
            continue
        low, high = newcombe_interval(both, one, other, neither)
        if low <= chances[1] - chances[2] <= high:
            table = (both, one, other, neither)
            ways = math.factorial(count) / math.prod(map(math.factorial, table))
            covered += ways * math.prod(chance**hits for chance, hits in zip(chances, table))
    assert 0.94 < covered < 0.98


def test_a_pair_tells_more_than_two_shares():
    """Two models that fall together, one a little later: their own intervals overlap, the paired one excludes 0."""
    one, other = [1] * 60 + [0] * 40, [1] * 52 + [0] * 48
    found = paired_difference(one, other)
    assert found.value == pytest.approx(0.08)
    assert found.told_apart
    assert wilson_interval(60, 100)[0] < wilson_interval(52, 100)[1]
    assert not paired_difference(one, one[::-1]).told_apart
    with pytest.raises(ValueError, match="zip"):
        paired_difference(one, other[1:])


def test_copies_of_an_image_count_once():
    one, other = [1, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]
    assert paired_difference(one * 3, other * 3, copies=3) == paired_difference(one, other)


def test_points_have_a_sign_and_no_negative_zero():
    assert [points(value) for value in (0.125, -0.0004, 0.0, -1)] == ["+12.5", "+0.0", "+0.0", "-100.0"]
    assert str(Difference(0.125, -0.01, 0.3)) == "+12.5 (-1.0 to +30.0)"


ONE = [SampleRecord(0, 1, 1), SampleRecord(1, 0, 0, 1, 0.5, "apgd-ce"), SampleRecord(2, 1, 1, 0, 0.5, "apgd-ce")]
OTHER = [SampleRecord(2, 1, 0, fooled_by="clean"), SampleRecord(1, 0, 0), SampleRecord(0, 1, 1)]


def of(records, **changes):
    return result(**(summarize(records) | changes)), records


def test_samples_are_found_by_their_id():
    clean, robust = compare_samples(of(ONE), of(OTHER))
    assert clean == paired_difference([1, 1, 1], [1, 1, 0])
    assert robust == paired_difference([1, 0, 0], [1, 1, 0])
    assert robust != paired_difference([1, 0, 0], [0, 1, 1])  # in the order of the files


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([], "no sample records"),
        (OTHER[:2], "records of other samples"),
        ([*OTHER[:2], SampleRecord(5, 1, 1, 0, 1.0, "apgd-ce")], "records of other samples"),
        ([*OTHER[:2], SampleRecord(0, 2, 2, 0, 1.0, "apgd-ce")], "records of other samples"),  # another true class
    ],
)
def test_nothing_is_guessed(records, why):
    for pair in ((of(ONE), (result(), records)), ((result(), records), of(ONE))):
        pair = [of(found) if found else (told, found) for told, found in pair]
        with pytest.raises(NotPaired, match=why):
            compare_samples(*pair)


def test_other_tasks():
    """Recall counts ranks, a corrupted image counts once, mean scores are no hits."""
    ranks = [SampleRecord(0, 0, 0, 3, fooled_by="apgd"), SampleRecord(1, 0, 2, 7, fooled_by="clean")]
    better = [SampleRecord(0, 0, 0, 0), SampleRecord(1, 0, 2, 2, fooled_by="clean")]
    recall = {"task": "retrieval", "metric": "image_to_text_recall@5"}
    one = result(**recall, **summarize_hits([True, True], [True, True])), better
    other = result(**recall, **summarize_hits([True, True], [True, False])), ranks
    clean, robust = compare_samples(one, other)
    assert (clean.value, robust.value) == (0, 0.5)

    severity = {"task": "corruption", "norm": "none", "eps": 0.0, "severity": 3, "attacks": [{"name": "fog"}] * 2}
    fallen = [SampleRecord(f"{name}/0", 1, 1, 0, 0.1, "fog") for name in ("fog", "snow")]
    stood = [SampleRecord(f"{name}/0", 1, 1, 1) for name in ("fog", "snow")]
    one, other = (
        (result(**severity, **summarize_hits([True], [hit])), found) for hit, found in ((True, stood), (False, fallen))
    )
    assert compare_samples(one, other)[1] == paired_difference([1], [0])

    captions = [SampleRecord(0, "a", "a", "c", 0.25, "pgd", 1.0), SampleRecord(1, "a", "a", None, 0.5, None, 0.5)]
    scored = result(task="caption", metric="chrF2", **summarize_scores(captions)), captions
    with pytest.raises(NotPaired, match="scores, which are neither right nor wrong"):
        compare_samples(scored, scored)
