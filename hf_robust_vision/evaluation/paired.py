"""Two models on the same samples: how far apart their accuracies lie, and how sure that is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .consistency import outcomes
from .results import RobustnessResult, SampleRecord, wilson_interval
from .task import Task
from .tasks import TASKS


Sampled = tuple[RobustnessResult, Sequence[SampleRecord]]


class NotPaired(ValueError):
    """Two results whose samples can not be compared one by one; the message is why."""


@dataclass(frozen=True)
class Difference:
    """One accuracy minus another over the same samples, with its paired 95 % interval; fractions in [-1, 1]."""

    value: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{points(self.value)} ({points(self.low)} to {points(self.high)})"


def points(difference: float) -> str:
    """A difference of fractions in points of percent."""
    return f"{100 * difference:+z.1f}"


def newcombe_interval(
    both: float, one: float, other: float, neither: float, z: float = 1.959963984540054
) -> tuple[float, float]:
    """Interval of the difference of two paired proportions, (both + one) / n minus (both + other) / n; of none (-1, 1).

    Args:
        both: Samples that both models have right.
        one: Samples that the first alone has right.
        other: Samples that the second alone has right.
        neither: Samples that neither has right.
        z: Quantile of the normal distribution; 95 % by default.

    Reference:
        Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10.
    """
    count = both + one + other + neither
    if count == 0:
        return -1.0, 1.0
    first, second = both + one, both + other
    (low1, high1), (low2, high2) = wilson_interval(first, count, z), wilson_interval(second, count, z)
    share1, share2 = first / count, second / count
    margins = first * (count - first) * second * (count - second)
    # The paper's correction: without it the correlation of few samples is taken for larger than it is.
    joint = both * neither - one * other
    joint = max(joint - count / 2, 0.0) if joint > 0 else joint
    correlation = joint / math.sqrt(margins) if margins > 0 else 0.0

    def reach(down: float, up: float) -> float:
        return math.sqrt(down**2 - 2 * correlation * down * up + up**2)

    difference = (one - other) / count
    low = difference - reach(share1 - low1, high2 - share2)
    high = difference + reach(share2 - low2, high1 - share1)
    return max(-1.0, low), min(1.0, high)


def paired_difference(one: Sequence[float], other: Sequence[float], copies: int = 1) -> Difference:
    """Share of hits of `one` minus that of `other`, flags (0 or 1) of the same samples in the same order.

    `copies` flags in a row of records belong to one image: the interval is as wide as if they agreed, never too narrow.
    """
    pairs = Counter(zip(one, other, strict=True))
    both, first, second, neither = (pairs[pair] / copies for pair in ((1, 1), (1, 0), (0, 1), (0, 0)))
    interval = newcombe_interval(both, first, second, neither)
    return Difference((first - second) / (both + first + second + neither), *interval)


def compare_samples(one: Sampled, other: Sampled) -> tuple[Difference, Difference]:
    """Clean and robust accuracy of `one` minus those of `other`, which were measured alike.

    Raises:
        NotPaired: If a model has no records, or scores in place of hits, or they are of other samples.
    """
    columns = []
    for result, records in (one, other):
        if not records:
            raise NotPaired("no sample records")
        columns.append(outcomes(result, records))
        if not set().union(*columns[-1]) <= {0.0, 1.0}:
            raise NotPaired("scores, which are neither right nor wrong")
    places = {record.id: place for place, record in enumerate(other[1])}
    truths = [{record.id: record.label for record in records} for _, records in (one, other)]
    if truths[0] != truths[1]:
        raise NotPaired("records of other samples")
    order = [places[record.id] for record in one[1]]
    copies = TASKS.get(one[0].task, Task).copies(one[0])
    clean, robust = (
        paired_difference(mine, [theirs[place] for place in order], copies) for mine, theirs in zip(*columns)
    )
    return clean, robust
