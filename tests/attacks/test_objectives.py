"""Objectives against cases worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hf_robust_vision.attacks import (
    DLR,
    CrossEntropy,
    EmbeddingDistance,
    LinfBall,
    Logits,
    Misclassified,
    TargetedDLR,
    apgd,
    cosine_distance,
    pgd,
    squared_l2,
)


IMAGE = torch.zeros(1, 3, 2, 2)


def fixed(*rows):
    table = torch.tensor(rows, dtype=torch.float64)
    return lambda images: table


@pytest.mark.parametrize(
    ("logits", "label", "wanted"),
    [
        ([0.0, 0.0], 0, math.log(2)),
        ([1.0, 0.0], 0, math.log(1 + math.exp(-1))),
        ([1.0, 0.0], 1, math.log(1 + math.e)),
        ([1.0, 2.0, 3.0], 2, math.log(1 + math.exp(-1) + math.exp(-2))),
    ],
)
def test_cross_entropy(logits, label, wanted):
    got = CrossEntropy(fixed(logits), torch.tensor([label]))(IMAGE)
    assert got.tolist() == [pytest.approx(wanted)]


@pytest.mark.parametrize(
    ("logits", "label", "wanted"),
    [
        ([3.0, 1.0, 0.0], 0, -2 / 3),  # -(3 - 1) / (3 - 0)
        ([3.0, 1.0, 0.0], 1, 2 / 3),  # -(1 - 3) / (3 - 0)
        ([3.0, 1.0, 0.0], 2, 1.0),  # -(0 - 3) / (3 - 0)
        ([5.0, 4.0, 2.0, 1.0], 0, -1 / 3),  # the third highest is 2
        ([5.0, 4.0, 2.0, 1.0], 3, 4 / 3),
    ],
)
def test_dlr(logits, label, wanted):
    assert DLR(fixed(logits), torch.tensor([label]))(IMAGE).tolist() == [pytest.approx(wanted)]


@pytest.mark.parametrize(
    ("label", "target", "wanted"),
    [
        (0, 1, -1 / 3.5),  # -(5 - 4) / (5 - (2 + 1) / 2)
        (0, 3, -4 / 3.5),
        (1, 0, 1 / 3.5),
    ],
)
def test_targeted_dlr(label, target, wanted):
    objective = TargetedDLR(fixed([5.0, 4.0, 2.0, 1.0]), torch.tensor([label]), torch.tensor([target]))
    assert objective(IMAGE).tolist() == [pytest.approx(wanted)]


def test_dlr_ignores_shift_and_scale():
    logits, label = torch.tensor([3.0, 1.0, 0.5]), torch.tensor([0])
    assert DLR(fixed((7 * logits + 11).tolist()), label)(IMAGE).item() == pytest.approx(
        DLR(fixed(logits.tolist()), label)(IMAGE).item()
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_too_few_classes(classes):
    logits, label = fixed([float(i) for i in range(classes)]), torch.tensor([0])
    with pytest.raises(ValueError, match=f"at least 4 classes, got {classes}"):
        TargetedDLR(logits, label, label)(IMAGE)
    if classes == 2:
        with pytest.raises(ValueError, match="at least 3 classes, got 2"):
            DLR(logits, label)(IMAGE)


@pytest.mark.parametrize(
    ("logits", "label", "wanted"),
    [
        ([1.0, 2.0], 1, False),
        ([1.0, 2.0], 0, True),
        ([float("nan"), 2.0], 0, False),
        ([float("nan"), float("nan")], 1, False),
        ([1.0, float("inf")], 0, False),
    ],
)
def test_misclassified(logits, label, wanted):
    assert Misclassified(fixed(logits), torch.tensor([label]))(IMAGE).tolist() == [wanted]


def test_distances():
    one, other = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])
    assert squared_l2(one, other).tolist() == [25.0, 5.0]  # summed, not averaged
    assert cosine_distance(one, torch.tensor([[6.0, 8.0], [0.0, 2.0]])).tolist() == pytest.approx([0.0, 1.0])


def test_take_cuts_every_tensor():
    table = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 4.0, 1.0], [9.0, 3.0, 2.0, 1.0]])
    labels, targets = torch.tensor([0, 2, 1]), torch.tensor([1, 3, 0])
    rows = torch.tensor([2, 0])

    def logits(images):  # the row number is hidden in the image
        return table[images[:, 0, 0, 0].long()]

    images = torch.arange(3.0).view(-1, 1, 1, 1).expand(3, 3, 2, 2)
    for objective in (
        CrossEntropy(logits, labels),
        DLR(logits, labels),
        TargetedDLR(logits, labels, targets),
        EmbeddingDistance(logits, table.flip(0), squared_l2),
        Misclassified(logits, labels),
    ):
        assert torch.equal(objective.take(rows)(images[rows]), objective(images)[rows])


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_objective_and_success_share_a_forward_pass(attack):
    calls = []

    def classify(images):
        calls.append(len(images))
        return images.flatten(1)[:, :3] * 1e-3 + torch.tensor([1.0, 0, 0])  # nobody is fooled

    logits, labels = Logits(classify), torch.tensor([0])
    attack(CrossEntropy(logits, labels), IMAGE + 0.5, LinfBall(0.1), steps=4, fooled=Misclassified(logits, labels))
    assert len(calls) == 5  # four steps and the start (APGD) or the last score (PGD)


def test_logits_notices_a_change_in_place():
    logits, image = Logits(lambda x: x.flatten(1)), IMAGE.clone()
    assert logits(image).sum() == 0
    image += 1
    assert logits(image).sum() == 12
