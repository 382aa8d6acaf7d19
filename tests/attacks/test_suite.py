"""Protocols: worst case per sample, what few classes leave out, and what a result says of it."""

from __future__ import annotations

import pytest
import torch

from hf_robust_vision.attacks import (
    PROTOCOLS,
    Attack,
    L2Ball,
    LinfBall,
    Protocol,
    StartNoise,
    get_protocol,
    run_protocol,
    suite,
)


IMAGES = torch.rand(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def linear_classifier(classes):
    weight = torch.randn(classes, 48, generator=torch.Generator().manual_seed(2))
    return lambda images: (images.flatten(1) - 0.5) @ weight.T


@pytest.mark.parametrize("name", list(PROTOCOLS))
@pytest.mark.parametrize("classes", [2, 3, 4, 5])
@pytest.mark.parametrize("ball", [LinfBall(0.05), L2Ball(0.3)], ids=["linf", "l2"])
def test_every_protocol_runs_with_few_classes(name, classes, ball):
    classify = linear_classifier(classes)
    labels = classify(IMAGES).argmax(1)
    protocol, left_out = get_protocol(name, steps=5).for_classes(classes)
    assert left_out == (["apgd-dlr-targeted"] if name == "robustvlm" and classes < 4 else [])
    outcome = run_protocol(protocol, classify, IMAGES, labels, ball, StartNoise(0, range(8)))
    wrong = (classify(outcome.images).argmax(1) != labels).tolist()
    assert [name is not None for name in outcome.fooled_by] == wrong
    assert (ball.distance(outcome.images, IMAGES) <= ball.eps + 1e-6).all()


def test_targets_are_cut_to_the_wrong_classes():
    protocol, _ = get_protocol("robustvlm").for_classes(5)
    assert protocol.attacks[1].targets == 4
    assert get_protocol("robustvlm").for_classes(1000)[0].attacks[1].targets == 9


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match="at least 2 classes, got 1"):
        get_protocol("apgd-ce").for_classes(1)


def test_worst_case_is_per_sample(monkeypatch):
    """Two attacks, each good at one half of the batch: all are fooled, each by the attack that did it first."""
    labels = torch.zeros(6, dtype=torch.long)
    images = torch.full((6, 3, 2, 2), 0.5)
    met = []

    def classify(batch):
        lit = (batch[:, 0, 0, 0] > 0.5).float()
        return torch.stack([1 - lit, lit], 1)

    def pretend(attack, logits, batch, labels, ball, noise):
        met.append((attack.name, list(noise.ids)))
        found = batch.clone()
        for row, sample in enumerate(noise.ids):
            if (attack.name == "even") == (sample % 2 == 0) and sample != 5:
                found[row, 0, 0, 0] += ball.eps
        return found

    monkeypatch.setattr(suite, "_run_attack", pretend)
    both = Protocol("both", (Attack("even"), Attack("odd")))
    outcome = run_protocol(both, classify, images, labels, LinfBall(0.1), StartNoise(0, [0, 1, 2, 3, 4, 5]))
    assert outcome.fooled_by == ["even", "odd", "even", "odd", "even", None]
    assert met == [("even", [0, 1, 2, 3, 4, 5]), ("odd", [1, 3, 5])]  # only the survivors go on
    assert classify(outcome.images).argmax(1).tolist() == [1, 1, 1, 1, 1, 0]


def test_more_attacks_never_raise_robust_accuracy():
    classify = linear_classifier(6)
    labels = classify(IMAGES).argmax(1)
    survivors = []
    for name in ("apgd-ce", "robustvlm"):
        protocol, _ = get_protocol(name, steps=10).for_classes(6)
        outcome = run_protocol(protocol, classify, IMAGES, labels, LinfBall(0.02), StartNoise(0, range(8)))
        survivors.append({i for i, fooled in enumerate(outcome.fooled_by) if fooled is None})
    assert survivors[1] <= survivors[0]


def test_budget_changes_every_attack():
    protocol = get_protocol("robustvlm", steps=7, restarts=3)
    assert [(a.steps, a.restarts) for a in protocol.attacks] == [(7, 3), (7, 3)]
    assert [a.steps for a in get_protocol("robustvlm").attacks] == [100, 100]


def test_unknown_protocol():
    with pytest.raises(ValueError, match="unknown protocol 'nope'.*'quick'"):
        get_protocol("nope")


def test_description_is_complete():
    rows = get_protocol("robustvlm").describe(LinfBall(4 / 255), resolution=224, seed=3, dtype=torch.bfloat16)
    wanted = {"name", "objective", "target", "steps", "step_size", "restarts", "resolution", "seed", "dtype"}
    assert all(wanted <= set(row) for row in rows)
    assert rows[0]["target"] is None
    assert rows[1]["target"].startswith("9 ")
    assert (rows[0]["dtype"], rows[0]["seed"], rows[0]["resolution"]) == ("bfloat16", 3, 224)
    (quick,) = get_protocol("quick").describe(LinfBall(0.1), resolution=32, seed=0, dtype=torch.float32)
    assert quick["step_size"] == pytest.approx(0.025)
