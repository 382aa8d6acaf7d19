"""Noise, restarts, early drop, zero and broken gradients."""

from __future__ import annotations

import re
import warnings

import pytest
import torch

from hf_robust_vision.attacks import (
    CrossEntropy,
    EmbeddingDistance,
    L2Ball,
    LinfBall,
    Logits,
    Misclassified,
    NonFiniteGradientWarning,
    StartNoise,
    apgd,
    cosine_distance,
    make_ball,
    pgd,
    squared_l2,
)


def classifier(classes: int = 3, sharp: float = 1.0):
    weight = torch.randn(classes, 3 * 6 * 6, generator=torch.Generator().manual_seed(3)) * sharp
    hidden = torch.randn(3 * 36, 3 * 36, generator=torch.Generator().manual_seed(4)) / 10
    return lambda images: torch.tanh((images.flatten(1) - 0.5) @ hidden) @ weight.T


IMAGES = torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(5))
LABELS = classifier()(IMAGES).argmax(1)


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_early_drop_gives_the_same_flags(attack):
    classify, noise = classifier(), StartNoise(0, range(16))
    for eps in (0.02, 0.05, 0.1):
        objective = CrossEntropy(classify, LABELS)
        fooled = Misclassified(classify, LABELS)
        whole = attack(objective, IMAGES, LinfBall(eps), steps=20, noise=noise)
        dropped = attack(objective, IMAGES, LinfBall(eps), steps=20, noise=noise, fooled=fooled)
        # Cross-entropy can rise past a fooling iterate to one that is not; the drop keeps the fooling one.
        assert (fooled(dropped) | ~fooled(whole)).all()
        assert fooled(dropped).sum() - fooled(whole).sum() <= 1
    assert fooled(dropped).sum() > 0


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_early_drop_computes_less(attack):
    seen = []

    def classify(images):
        seen.append(len(images))
        return classifier()(images)

    logits = Logits(classify)
    labels = torch.where(torch.arange(16) < 8, LABELS, (LABELS + 1) % 3)  # half of them are fooled from the start
    attack(CrossEntropy(logits, labels), IMAGES, LinfBall(1e-4), steps=10, fooled=Misclassified(logits, labels))
    assert seen == [16, *[8] * 10]


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_a_fooling_image_counts_more_than_a_higher_loss(attack):
    """The objective is a ridge that the first step jumps over; what fools lies on the far, lower side."""
    label = torch.tensor([0])

    def height(images):
        return (images - 0.5).flatten(1).sum(1) - 0.01

    ridge = EmbeddingDistance(height, torch.zeros(1), lambda features, target: -(features - target).abs())
    fooled = Misclassified(lambda images: torch.stack([-height(images), height(images)], 1), label)
    image = torch.full((1, 3, 4, 4), 0.5)
    found = attack(ridge, image, LinfBall(0.1), steps=3, fooled=fooled)
    assert fooled(found).all()
    assert ridge(found) < ridge(image)


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_restarts_only_help(attack):
    classify, noise = classifier(sharp=10), StartNoise(0, range(16))
    objective, ball = CrossEntropy(classify, LABELS), LinfBall(0.02)
    losses = [objective(attack(objective, IMAGES, ball, steps=3, noise=noise, restarts=n)) for n in (1, 2, 4)]
    assert (losses[1] >= losses[0]).all()
    assert (losses[2] >= losses[1]).all()
    assert (losses[2] > losses[0]).any()


@pytest.mark.parametrize("distance", [cosine_distance, squared_l2])
@pytest.mark.parametrize("attack", [pgd, apgd])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_zero_gradient_start(attack, distance, norm):
    """The distance to the own clean embedding has no gradient at the clean image: only noise leaves it."""
    images = IMAGES.double()
    weight = torch.randn(8, 108, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def features(x):
        return x.flatten(1) @ weight.T

    objective = EmbeddingDistance(features, features(images), distance)
    ball = make_ball(norm, 0.05)
    stuck = attack(objective, images, ball, steps=5)
    noise = StartNoise(0, range(16))
    free = attack(objective, images, ball, steps=5, noise=noise)
    started = objective(ball.start(images, noise.draw(images)))
    if distance is squared_l2:  # the cosine's gradient is zero up to rounding, whose sign is not
        assert torch.equal(stuck, images)
    assert (objective(free) > 2 * started).all()


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_broken_gradients_are_counted(attack):
    """One image of 16 has NaN gradients; the others are attacked as ever."""

    def objective(images):
        loss = images.flatten(1).sum(1)
        return torch.cat([loss[:3], (loss[3:4] * 0).sqrt(), loss[4:]])  # the root has no slope at 0

    with pytest.warns(NonFiniteGradientWarning, match=r"not finite") as caught:
        found = attack(objective, IMAGES, LinfBall(0.1), steps=4)
    bad, seen = map(int, re.match(r"(\d+) of (\d+)", str(caught[0].message)).groups())
    assert 0 < bad <= seen / 16
    assert found.isfinite().all()
    others = torch.arange(16) != 3
    torch.testing.assert_close(found[others], (IMAGES[others] + 0.1).clamp(max=1))


def test_sound_gradients_are_not_reported():
    with warnings.catch_warnings():
        warnings.simplefilter("error", NonFiniteGradientWarning)
        pgd(lambda x: x.flatten(1).sum(1), IMAGES, LinfBall(0.1), steps=2)


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_objective_without_take_says_so(attack):
    def bare(images):
        return classifier()(images).logsumexp(1)

    half_right = Misclassified(classifier(), torch.where(torch.arange(16) < 8, LABELS, (LABELS + 1) % 3))
    with pytest.raises(ValueError, match=r"no take\(rows\)"):
        attack(bare, IMAGES, LinfBall(0.3), steps=5, fooled=half_right)


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_impossible_radius(norm, eps):
    with pytest.raises(ValueError, match="eps"):
        make_ball(norm, eps)


def test_linf_radius_in_255_units():
    with pytest.raises(ValueError, match="eps=4/255"):
        LinfBall(4)
    assert L2Ball(4).eps == 4


def test_unknown_norm():
    with pytest.raises(ValueError, match=r"'l1'.*'linf', 'l2'"):
        make_ball("l1", 0.1)


def test_l2_direction_of_tiny_gradients():
    """Squares of 1e-30 underflow in float32; the direction must not."""
    gradient = torch.full((1, 3, 2, 2), 1e-30)
    assert float(L2Ball(1.0).ascend(gradient).norm()) == pytest.approx(1, rel=1e-5)
    assert (L2Ball(1.0).ascend(torch.zeros(1, 3, 2, 2)) == 0).all()
