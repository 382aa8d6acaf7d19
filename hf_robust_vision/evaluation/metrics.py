"""Robust accuracy, attack success rate and relative robustness as `evaluate.Metric`s that need no network.

They take what any attack of any library found, sample by sample.

Example:
    >>> from hf_robust_vision.evaluation.metrics import RobustAccuracy
    >>> RobustAccuracy().compute(predictions=[0, 1, 0], references=[0, 1, 1])["robust_accuracy"]
    0.6666666666666666
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor

from .results import wilson_interval


_CITATION = "https://huggingface.co/papers/2003.01690"
_INPUTS = """
Args:
    predictions: Predicted class of each adversarial image; or a list of them, one for each attack, where a sample is
        right only if it is right under all.
    references: True classes.
    clean_predictions: Predicted class of each clean image, where the metric compares with it.
"""


class _RobustnessMetric(evaluate.Metric):
    needs_clean = True

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        columns = {"references": number} | ({"clean_predictions": number} if self.needs_clean else {})
        # `evaluate` checks columns against the first form that fits.
        one_attack = datasets.Features({"predictions": number} | columns)
        many_attacks = datasets.Features({"predictions": datasets.Sequence(number)} | columns)
        return evaluate.MetricInfo(
            description=str(self.__doc__),
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=[one_attack, many_attacks],
        )


class RobustAccuracy(_RobustnessMetric):
    """Share of samples that are right under every attack, with its Wilson interval.

    `compute(predictions, references)` gives `robust_accuracy`, `robust_accuracy_ci95` and `num_samples`. Give the clean
    predictions as one more attack if samples that were wrong before shall not count, as `evaluate_zero_shot` does.
    """

    needs_clean = False

    def _compute(self, predictions: Sequence[Any], references: Sequence[int]) -> dict[str, Any]:
        return _share("robust_accuracy", _right(predictions, references))


class AttackSuccessRate(_RobustnessMetric):
    """Share of the samples right on the clean image that some attack fools, with its Wilson interval.

    `compute(predictions, references, clean_predictions)` gives `attack_success_rate`, `attack_success_rate_ci95` and
    `num_samples`, the samples that were right and so could be attacked.
    """

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[int], clean_predictions: Sequence[int]
    ) -> dict[str, Any]:
        clean, robust = _right(clean_predictions, references), _right(predictions, references)
        return _share("attack_success_rate", ~robust[clean])


class RelativeRobustness(_RobustnessMetric):
    """Accuracy under attack over clean accuracy, with a bootstrap interval.

    `compute(predictions, references, clean_predictions)` gives `relative_robustness`, `relative_robustness_ci95` and
    `num_samples`. Both accuracies come from the same samples, so the interval is that of 10,000 draws of samples with
    both their answers; draws without a right clean answer have no ratio and are left out.
    """

    draws = 10_000

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[int], clean_predictions: Sequence[int], seed: int = 0
    ) -> dict[str, Any]:
        clean, robust = _right(clean_predictions, references), _right(predictions, references)
        # A sample is one of four kinds, so a draw of samples is a draw of how many there are of each.
        kinds = torch.bincount(2 * clean.long() + robust.long(), minlength=4).double()
        ratio = _ratio(kinds)
        ratios = _ratio(_redraw(kinds, self.draws, torch.Generator().manual_seed(seed)))
        ratios = ratios[ratios.isfinite()]
        bounds = torch.tensor([0.025, 0.975], dtype=ratios.dtype)
        interval = ratios.quantile(bounds).tolist() if len(ratios) else [0.0, float("inf")]
        name = "relative_robustness"
        return {name: ratio.item(), f"{name}_ci95": interval, "num_samples": len(clean)}


def _right(predictions: Sequence[Any], references: Sequence[int]) -> Tensor:
    """One flag a sample: is it right, under all attacks if there are several?"""
    guesses, truth = torch.as_tensor(predictions), torch.as_tensor(references)
    return (guesses == truth[:, None]).all(1) if guesses.ndim == 2 else guesses == truth


def _share(name: str, hits: Tensor) -> dict[str, Any]:
    count, total = int(hits.sum()), len(hits)
    share = count / total if total else float("nan")
    return {name: share, f"{name}_ci95": list(wilson_interval(count, total)), "num_samples": total}


def _redraw(kinds: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Multinomial draws of as many samples as `kinds` counts, shape (draws, kinds), one kind after the other."""
    left, columns = kinds.sum().repeat(draws), []
    for place, count in enumerate(kinds):
        share = count / kinds[place:].sum().clamp_min(1)
        columns.append(torch.binomial(left, share.expand(draws).contiguous(), generator=generator))
        left = left - columns[-1]
    return torch.stack(columns, 1)


def _ratio(kinds: Tensor) -> Tensor:
    """Robust over clean hits from counts of (neither, robust only, clean only, both) in the last dimension."""
    return (kinds[..., 1] + kinds[..., 3]) / (kinds[..., 2] + kinds[..., 3])
