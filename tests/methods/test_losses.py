"""The Siamese loss and its parts, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from hf_robust_vision.attacks import cosine_distance, squared_l2
from hf_robust_vision.methods.drift import split_output
from hf_robust_vision.methods.features import FeatureDistance, detached, token_variances
from hf_robust_vision.methods.sim_clip import siamese_loss
from hf_robust_vision.towers.base import EncoderOutput, Reads
from hf_robust_vision.towers.reference import Reference
from hf_robust_vision.training.collapse import (
    CollapseError,
    check_collapse,
    mean_pairwise_cosine,
)
from tests.conftest import make_dataset


POOLED = FeatureDistance("pooled")


def output(embeds, tokens=None, grad=False):
    pack = {"image_embeds": torch.tensor(embeds, dtype=torch.float64, requires_grad=grad)}
    if tokens is not None:
        pack["patch_tokens"] = torch.tensor(tokens, dtype=torch.float64, requires_grad=grad)
    return EncoderOutput(**pack)


@pytest.mark.parametrize(
    ("clean", "adversarial", "wanted"),
    [
        ([1.0, 0.0], [1.0, 0.0], 0.0),
        ([1.0, 0.0], [0.0, 1.0], 1.0),
        ([1.0, 0.0], [-2.0, 0.0], 2.0),
        ([3.0, 4.0], [4.0, 3.0], 1 - 24 / 25),
        ([1.0, 0.0], [1.0, 1.0], 1 - 1 / math.sqrt(2)),
    ],
)
def test_loss_by_hand(clean, adversarial, wanted):
    """With d = 1 - cosine the two halves add up to 1 - cosine."""
    loss = siamese_loss(POOLED, output([clean]), output([adversarial]))
    assert loss.tolist() == [pytest.approx(wanted, abs=1e-12)]


def gradient_of(distance, clean, adversarial, of):
    siamese_loss(distance, clean, adversarial).sum().backward()
    return of.image_embeds.grad


def test_each_side_gets_half_of_the_distances_gradient():
    """d(1 - cos(a, b)) / da = -(b/|b| - cos a/|a|) / |a|; stop-gradient halves it on either side."""
    clean, adversarial = output([[3.0, 4.0]], grad=True), output([[1.0, 0.0]], grad=True)
    siamese_loss(POOLED, clean, adversarial).sum().backward()
    # cos = 0.6. At a = (1, 0): -(0.6, 0.8) + 0.6 (1, 0) = (0, -0.8), and half of it.
    torch.testing.assert_close(adversarial.image_embeds.grad, torch.tensor([[0.0, -0.4]], dtype=torch.float64))
    # At b = (3, 4): -((1, 0) - 0.6 (0.6, 0.8)) / 5 = (-0.128, 0.096), and half of it.
    torch.testing.assert_close(clean.image_embeds.grad, torch.tensor([[-0.064, 0.048]], dtype=torch.float64))


def test_frozen_target_gives_half_of_the_cosine_distances_gradient():
    target, one, other = output([[3.0, 4.0]]), output([[1.0, 0.5]], grad=True), output([[1.0, 0.5]], grad=True)
    siamese_loss(POOLED, target, one).sum().backward()
    cosine_distance(other.image_embeds, target.image_embeds).sum().backward()
    torch.testing.assert_close(one.image_embeds.grad, other.image_embeds.grad / 2)


def test_stop_gradient_stops():
    """Of the two halves, only the one in which a side is not the target reaches that side."""
    calls = []

    def distance(output, target):
        calls.append((output.image_embeds.requires_grad, target.image_embeds.requires_grad))
        return POOLED(output, target)

    siamese_loss(distance, output([[1.0, 2.0]], grad=True), output([[2.0, 1.0]], grad=True))
    assert calls == [(True, False), (True, False)]


def test_tokens_and_both():
    one = output([[1.0, 0.0]], [[[1.0, 2.0], [3.0, 4.0]]])
    other = output([[0.0, 1.0]], [[[1.0, 0.0], [3.0, 0.0]]])
    tokens = FeatureDistance("patch_tokens", variances=(4.0,))
    both = FeatureDistance("both", variances=(4.0,))
    assert tokens(one, other).item() == pytest.approx((4 + 16) / 4 / 4)
    assert both(one, other).item() == pytest.approx(1 + 1.25)
    squared = FeatureDistance("both", pooled=squared_l2, variances=(4.0,))
    assert squared(one, other).item() == pytest.approx(2 + 1.25)


def test_low_precision_is_widened():
    near = torch.tensor([[100.0, 1.0]], dtype=torch.bfloat16)
    loss = POOLED(EncoderOutput(image_embeds=near), EncoderOutput(image_embeds=near * 2))
    assert loss.dtype == torch.float32


def test_token_variance_is_that_of_the_first_images(encoder):
    data = make_dataset(70)
    reference = Reference(encoder, Reads("patch_tokens"))
    images = torch.stack([data[i]["images"] for i in range(64)])
    tokens = reference(images).patch_tokens.flatten(0, 1)
    assert token_variances(reference, data) == pytest.approx([float(tokens.var(0).mean())], rel=1e-5)
    assert token_variances(Reference(encoder), data) == ()
    assert token_variances(reference, None) == ()


def test_split_and_detach():
    whole = output([[1.0], [2.0], [3.0]], [[[1.0]], [[2.0]], [[3.0]]], grad=True)
    first, rest = split_output(whole, 1)
    assert first.image_embeds.tolist() == [[1.0]]
    assert rest.patch_tokens.flatten().tolist() == [2.0, 3.0]
    assert first.text_embeds is None
    assert rest.image_embeds.requires_grad
    assert not detached(rest).patch_tokens.requires_grad


@pytest.mark.parametrize(
    ("embeds", "wanted"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], 0.0),
        ([[1.0, 0.0], [5.0, 0.0]], 1.0),
        ([[1.0, 0.0], [-1.0, 0.0]], -1.0),
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 3.0]], 1 / 3),
        ([[1.0, 0.0]], 0.0),
    ],
)
def test_pairwise_cosine(embeds, wanted):
    assert float(mean_pairwise_cosine(torch.tensor(embeds))) == pytest.approx(wanted, abs=1e-6)


def test_pairwise_cosine_of_images_on_two_processes():
    """The same as of all on one, also where each process holds a single image."""
    embeds = torch.randn(3, 5)
    for first in (1, 2):
        mine, others = embeds[:first], torch.nn.functional.normalize(embeds[first:], dim=-1)
        sums = torch.cat([others.sum(0), torch.tensor([3.0 - first])])
        together = mean_pairwise_cosine(mine, lambda part, sums=sums: part + sums)
        assert float(together) == pytest.approx(float(mean_pairwise_cosine(embeds)), abs=1e-6)


@pytest.mark.parametrize(
    ("pairwise", "original", "collapsed"),
    [
        (0.99, 0.5, True),
        (0.94, 0.5, False),
        (0.951, 0.5, True),
        (0.9999, 0.9995, False),
        (1.0, 0.0, True),
        (0.5, 0.9, False),
    ],
)
def test_collapse_is_a_loss_of_spread(pairwise, original, collapsed):
    if not collapsed:
        check_collapse(pairwise, original, "stop", 7, "type this")
        return
    with pytest.raises(CollapseError, match=r"collapsed at step 7.*; type this"):
        check_collapse(pairwise, original, "stop", 7, "type this")
    with pytest.warns(UserWarning, match="collapsed at step 7"):
        check_collapse(pairwise, original, "record", 7, "type this")


@pytest.mark.parametrize("on_collapse", ["stop", "record"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_no_numbers_are_called_so(value, on_collapse):
    """Not "collapsed", and not a matter of what to do about a collapse (findings-reliability 9)."""
    with pytest.raises(ValueError, match="embeddings of step 7 are not finite; type this"):
        check_collapse(value, 0.5, on_collapse, 7, "type this")
