"""What an attacker maximises and what counts as success.

An objective maps images in [0, 1] to one loss per image. An objective that closes over per-sample data offers
`take(rows)`, so that an attack can go on with some images of a batch only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor


ImagesToLogits = Callable[[Tensor], Tensor]
ImagesToFeatures = Callable[[Tensor], Tensor]
_T = TypeVar("_T", bound="PerSample")


class Objective(Protocol):
    """Images in [0, 1], shape (batch, 3, height, width), to one loss per image, shape (batch,)."""

    def __call__(self, images: Tensor, /) -> Tensor:
        """The losses that the attack raises, one per image, never their mean."""


class Success(Protocol):
    """Images in [0, 1] to one flag per image: has the attack reached its goal there?"""

    def __call__(self, images: Tensor, /) -> Tensor:
        """Boolean flags, shape (batch,)."""

    def take(self, rows: Tensor, /) -> Success:
        """The same criterion for some images of the batch."""


class Logits:
    """Images to class logits, remembering the latest answer.

    An objective and a success criterion that look at the same images in turn share one forward pass.
    """

    def __init__(self, function: ImagesToLogits):
        self.function = function
        self._images: Tensor | None = None
        self._version = -1
        self._logits: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        # The version counts writes in place, after which the same tensor holds other images.
        stale = self._images is not images or self._version != images._version
        if stale or self._logits is None or (images.requires_grad and not self._logits.requires_grad):
            self._logits = self.function(images)
            self._images, self._version = images, images._version
        return self._logits


class PerSample:
    """Base of dataclasses that hold per-sample data: tensors, or what has a `take` of its own."""

    def take(self: _T, rows: Tensor) -> _T:
        """The same objective for some images of the batch; `rows` holds their indices."""
        held = vars(self).items()
        parts = {name: value[rows] for name, value in held if isinstance(value, Tensor)}
        parts |= {name: value.take(rows) for name, value in held if name not in parts and hasattr(value, "take")}
        return replace(self, **parts)  # type: ignore[type-var]


@dataclass(frozen=True)
class _OfClasses(PerSample):
    """Shared by objectives of a classifier."""

    logits: ImagesToLogits  # to shape (batch, classes)
    labels: Tensor  # true classes, shape (batch,)


@dataclass(frozen=True)
class _Targeted(_OfClasses):
    """Shared by objectives that pull towards a chosen class."""

    targets: Tensor  # wanted classes, shape (batch,)


class CrossEntropy(_OfClasses):
    """Cross-entropy of the true class, from `logits` and `labels`."""

    # Where a model is sure its gradient is a rounding error: an attack on it alone overrates a model of large logits.
    # Hence the ratio and the margins below.

    def __call__(self, images: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        return F.cross_entropy(self.logits(images), self.labels, reduction="none")


class DLR(_OfClasses):
    """Difference of logits ratio, invariant to shift and scale of the logits, from `logits` and `labels`.

    Raises:
        ValueError: If there are fewer than 3 classes, for which the ratio is not defined.

    Reference:
        Croce and Hein 2020, https://huggingface.co/papers/2003.01690, eq. 6.
    """

    def __call__(self, images: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        logits = self.logits(images)
        _need_classes(logits, 3, "DLR")
        # The margin to the strongest wrong class, since that one is the nearest to fool with, over the distance from the
        # first to the third logit: the divisor takes away the scale of the logits, by which a model can make gradients
        # vanish. Not to the second, which is the margin itself up to its sign: the ratio would be -1 or 1 everywhere.
        ordered = logits.sort(dim=1, descending=True).values
        return -_margin(logits, self.labels) / (ordered[:, 0] - ordered[:, 2] + 1e-12)


class TargetedDLR(_Targeted):
    """Difference of logits ratio towards a chosen class, from `logits`, `labels` and `targets`.

    Raises:
        ValueError: If there are fewer than 4 classes, for which the ratio is not defined.

    Reference:
        Croce and Hein 2020, https://huggingface.co/papers/2003.01690, eq. 7.
    """

    def __call__(self, images: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        logits = self.logits(images)
        _need_classes(logits, 4, "targeted DLR")
        ordered = logits.sort(dim=1, descending=True).values
        # Against the third logit alone, a target in third place would make the ratio 1 whatever the logits are.
        spread = ordered[:, 0] - (ordered[:, 2] + ordered[:, 3]) / 2 + 1e-12
        return -(_pick(logits, self.labels) - _pick(logits, self.targets)) / spread


class Margin(_OfClasses):
    """Highest wrong logit minus the true one: above zero where the image is misclassified."""

    # For Square, which compares losses of one image and takes no gradient: no scale to take away, no vanishing.

    def __call__(self, images: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        return -_margin(self.logits(images), self.labels)


class TargetedMargin(_Targeted):
    """Logit of a chosen class minus the true one: zero on the boundary between the two."""

    # For FAB, whose steps need the distance to a boundary: a difference of two logits is the smoothest function with
    # that zero level. A maximum over all wrong classes has kinks, and a ratio bends.

    def __call__(self, images: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        logits = self.logits(images)
        return _pick(logits, self.targets) - _pick(logits, self.labels)


@dataclass(frozen=True)
class EmbeddingDistance(PerSample):
    """Distance of the features from given features, for attacks that know no labels."""

    features: ImagesToFeatures  # to shape (batch, ...)
    target: Tensor  # to move away from, the same shape
    distance: Callable[[Tensor, Tensor], Tensor]  # `squared_l2`, `cosine_distance` or another, to shape (batch,)

    def __call__(self, images: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        return self.distance(self.features(images), self.target)


def squared_l2(features: Tensor, target: Tensor) -> Tensor:
    """Squared Euclidean distance per image, SUMMED over the feature dimensions as FARE does; shape (batch,)."""
    return (features - target).square().flatten(1).sum(1)


def cosine_distance(features: Tensor, target: Tensor) -> Tensor:
    """One minus the cosine per image, shape (batch,)."""
    return 1 - F.cosine_similarity(features.flatten(1), target.flatten(1), dim=1)


class Misclassified(_OfClasses):
    """Success of an untargeted attack; given the same `Logits` as the objective, it computes nothing twice."""

    def __call__(self, images: Tensor) -> Tensor:
        """Is the highest logit not the true class? Shape (batch,); where logits are not finite nobody has fooled."""
        logits = self.logits(images).detach()
        return (logits.argmax(1) != self.labels) & logits.isfinite().all(1)


def _margin(logits: Tensor, labels: Tensor) -> Tensor:
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return _pick(logits, labels) - others.amax(1)


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _need_classes(logits: Tensor, wanted: int, name: str) -> None:
    if logits.shape[1] < wanted:
        raise ValueError(f"{name} needs at least {wanted} classes, got {logits.shape[1]}; use CrossEntropy.")
