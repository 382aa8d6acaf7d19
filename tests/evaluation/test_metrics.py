"""Metrics against counts by hand, and their intervals against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.evaluation.metrics import AttackSuccessRate, RelativeRobustness, RobustAccuracy, _redraw
from hf_robust_vision.evaluation.results import load_samples, wilson_interval
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot


# Ten samples of class 0: eight right on the clean image, of which three fall; one wrong one is mended by the attack.
TRUTH = [0] * 10
CLEAN = [0] * 8 + [1, 1]
ATTACKED = [0] * 5 + [1, 1, 1] + [0, 1]


def test_robust_accuracy():
    got = RobustAccuracy().compute(predictions=ATTACKED, references=TRUTH)
    assert got == {
        "robust_accuracy": 0.6,
        "robust_accuracy_ci95": list(wilson_interval(6, 10)),
        "num_samples": 10,
    }


def test_worst_case_over_attacks_is_per_sample():
    """Two attacks that each fool another third: together two thirds, whatever their mean says."""
    got = RobustAccuracy().compute(predictions=[[1, 0], [0, 1], [0, 0]], references=[0, 0, 0])
    assert got["robust_accuracy"] == pytest.approx(1 / 3)
    both = [[attacked, clean] for attacked, clean in zip(ATTACKED, CLEAN)]  # clean as one more attack
    assert RobustAccuracy().compute(predictions=both, references=TRUTH)["robust_accuracy"] == 0.5


def test_attack_success_rate_counts_only_what_was_right():
    got = AttackSuccessRate().compute(predictions=ATTACKED, references=TRUTH, clean_predictions=CLEAN)
    assert got == {
        "attack_success_rate": 3 / 8,
        "attack_success_rate_ci95": list(wilson_interval(3, 8)),
        "num_samples": 8,
    }


def test_relative_robustness():
    got = RelativeRobustness().compute(predictions=ATTACKED, references=TRUTH, clean_predictions=CLEAN)
    assert got["relative_robustness"] == pytest.approx(6 / 8)
    low, high = got["relative_robustness_ci95"]
    assert 0 < low < 0.75 < high


def test_bootstrap_interval_is_the_binomial_one_where_all_were_right():
    """Then the ratio is robust accuracy itself, and draws of it are binomial."""
    count, share = 400, 0.3
    attacked = [0] * int(share * count) + [1] * int((1 - share) * count)
    got = RelativeRobustness().compute(predictions=attacked, references=[0] * count, clean_predictions=[0] * count)
    half = 1.96 * math.sqrt(share * (1 - share) / count)
    assert got["relative_robustness_ci95"] == pytest.approx([share - half, share + half], abs=0.004)


def test_bootstrap_interval_of_a_ratio_is_the_delta_method_s():
    count = 2000
    clean = [0] * 1600 + [1] * 400
    attacked = [0] * 800 + [1] * 800 + [0] * 100 + [1] * 300
    got = RelativeRobustness().compute(predictions=attacked, references=[0] * count, clean_predictions=clean)
    a, c = torch.tensor(attacked) == 0, torch.tensor(clean) == 0
    ratio = (a.double().mean() / c.double().mean()).item()
    deviation = (a.double() - ratio * c.double()).std().item() / c.double().mean().item() / math.sqrt(count)
    assert got["relative_robustness"] == pytest.approx(ratio)
    assert got["relative_robustness_ci95"] == pytest.approx(
        [ratio - 1.96 * deviation, ratio + 1.96 * deviation], abs=0.003
    )


def test_draws_are_multinomial():
    kinds = torch.tensor([10.0, 0.0, 30.0, 60.0], dtype=torch.double)
    draws = _redraw(kinds, 20_000, torch.Generator().manual_seed(0))
    assert (draws.sum(1) == 100).all()
    assert torch.allclose(draws.mean(0), kinds, atol=0.15)
    shares = kinds / 100
    covariance = 100 * (shares.diag() - shares[:, None] * shares[None])
    assert torch.allclose(draws.T.cov(), covariance, atol=0.6)


@pytest.mark.parametrize("kind", [torch.tensor, list])
def test_batches_add_up(kind):
    for metric, more in ((RobustAccuracy(), {}), (AttackSuccessRate(), CLEAN), (RelativeRobustness(), CLEAN)):
        for rows in (slice(0, 3), slice(3, 10)):
            columns = {"predictions": ATTACKED, "references": TRUTH} | ({"clean_predictions": more} if more else {})
            metric.add_batch(**{name: kind(column[rows]) for name, column in columns.items()})
        in_parts = metric.compute()
        assert in_parts == metric.compute(**columns)


def test_nothing_right_has_no_ratio():
    columns = {"predictions": [1, 1], "references": [0, 0], "clean_predictions": [1, 1]}
    assert math.isnan(RelativeRobustness().compute(**columns)["relative_robustness"])
    got = AttackSuccessRate().compute(**columns)
    assert math.isnan(got["attack_success_rate"])
    assert got["attack_success_rate_ci95"] == [0.0, 1.0]


def test_a_column_that_is_missing_is_named():
    with pytest.raises(ValueError, match="clean_predictions"):
        AttackSuccessRate().compute(predictions=ATTACKED, references=TRUTH)


def test_they_agree_with_the_evaluator(encoder, bank, labelled_by_model, tmp_path):
    how = RobustnessProtocol(get_protocol("apgd-ce", steps=5), (0.5 / 255,))
    (result,) = evaluate_zero_shot(
        encoder, bank, labelled_by_model, how, model_name="m", samples_dir=tmp_path, progress=False
    )
    records = load_samples(tmp_path / result.samples)
    clean = [record.clean for record in records]
    attacked = [record.clean if record.adversarial is None else record.adversarial for record in records]
    columns = {"predictions": attacked, "references": [record.label for record in records]}
    robust = RobustAccuracy().compute(**columns)
    assert robust["robust_accuracy"] == result.robust_accuracy
    assert robust["robust_accuracy_ci95"] == result.ci95["robust_accuracy"]
    success = AttackSuccessRate().compute(**columns, clean_predictions=clean)["attack_success_rate"]
    kept = RelativeRobustness().compute(**columns, clean_predictions=clean)["relative_robustness"]
    assert kept == pytest.approx(result.robust_accuracy / result.clean_accuracy) == pytest.approx(1 - success)
