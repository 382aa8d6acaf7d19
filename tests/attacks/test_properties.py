"""What must hold for every attack in every ball, on the tiny CLIP."""

from __future__ import annotations

import pytest
import torch

from hf_robust_vision.attacks import (
    CrossEntropy,
    L2Ball,
    LinfBall,
    Logits,
    Misclassified,
    StartNoise,
    TargetedMargin,
    apgd,
    fab,
    fgsm,
    make_ball,
    pgd,
    pgd_last,
    square,
)
from hf_robust_vision.towers.base import attack_mode


def towards_the_nearest_class(objective, images, ball, noise):
    """FAB wants an objective with a boundary: made from the logits and labels of the given one."""
    logits, labels = objective.logits, objective.labels
    with torch.no_grad():
        target = logits(images).scatter(1, labels[:, None], -torch.inf).argmax(1) if len(images) else labels
    boundary = TargetedMargin(Logits(logits), labels, target)
    fooled = Misclassified(boundary.logits, labels)
    return fab(boundary, images, ball, fooled=fooled, steps=5, restarts=2, noise=noise)


ATTACKS = {
    "pgd": lambda *a, **k: pgd(*a, steps=5, **k),
    "pgd-restarts": lambda *a, **k: pgd(*a, steps=3, restarts=2, **k),
    "pgd-last": lambda *a, **k: pgd_last(*a, steps=5, **k),
    "fgsm": fgsm,
    "apgd": lambda *a, **k: apgd(*a, steps=8, **k),
    "apgd-restarts": lambda *a, **k: apgd(*a, steps=5, restarts=2, **k),
    "square": lambda *a, **k: square(*a, queries=30, **k),
    "fab": lambda *a, **k: towards_the_nearest_class(*a, **k),
}
BALLS = {"linf": LinfBall(1 / 255), "l2": L2Ball(0.1), "linf-large": LinfBall(0.5), "l2-large": L2Ball(20.0)}
table = pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))
balls = pytest.mark.parametrize("ball", BALLS.values(), ids=list(BALLS))


@pytest.fixture
def case(encoder, bank, labelled_by_model):
    """The model as a classifier, 8 images, their labels and noise."""
    items = [labelled_by_model[i] for i in range(8)]
    images = torch.stack([item["images"] for item in items])
    labels = torch.tensor([item["labels"] for item in items])
    return bank.classify(lambda x: encoder(x).image_embeds), images, labels, StartNoise(0, [i["ids"] for i in items])


@balls
@table
def test_inside_ball_and_range(attack, ball, case):
    classify, images, labels, noise = case
    objective = CrossEntropy(classify, labels)
    found = attack(objective, images, ball, noise=noise)
    assert found.shape == images.shape
    assert not found.requires_grad
    assert found.dtype == images.dtype
    assert (ball.distance(found, images) <= ball.eps * (1 + 1e-6) + 1e-7).all()
    assert found.min() >= 0
    assert found.max() <= 1
    if attack is not ATTACKS["fab"]:  # which gives the clean image where it finds none inside the ball
        assert (found != images).flatten(1).any(1).all()


@table
def test_loss_is_not_below_clean(attack, case):
    classify, images, labels, noise = case
    objective = CrossEntropy(classify, labels)
    if attack is fgsm:
        noise = None  # a single step from a random start may end below
    for ball in (LinfBall(0.25 / 255), L2Ball(0.02)):
        found = attack(objective, images, ball, noise=noise)
        with torch.no_grad():
            risen = (objective(found) > objective(images)) | (found == images).flatten(1).all(1)
            assert risen.any() if attack is ATTACKS["fab"] else (objective(found) > objective(images)).all()
            assert risen.all()


@table
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_eps_zero_is_identity(attack, norm, case):
    classify, images, labels, noise = case
    found = attack(CrossEntropy(classify, labels), images, make_ball(norm, 0.0), noise=noise)
    assert torch.equal(found, images)
    assert found is not images


@table
@pytest.mark.parametrize("ball", [LinfBall(0.5 / 255), L2Ball(0.06)], ids=["linf", "l2"])
def test_flags_do_not_depend_on_the_batch(attack, ball, case):
    """The whole batch, its reverse, and one image at a time."""
    classify, images, labels, noise = case

    def flags(rows):
        rows = torch.tensor(rows)
        found = attack(CrossEntropy(classify, labels[rows]), images[rows], ball, noise=noise.take(rows))
        return dict(zip(rows.tolist(), Misclassified(classify, labels[rows])(found).tolist()))

    whole = flags(list(range(8)))
    assert set(whole.values()) == {True, False}, "a case where nothing can differ tests nothing"
    assert flags(list(range(8))[::-1]) == whole
    alone = {}
    for row in range(8):
        alone |= flags([row])
    assert alone == whole


@table
def test_no_trace(attack, case, encoder):
    """Mode, requires_grad, param.grad, the images, and the global random state are as they were."""
    classify, images, labels, noise = case
    encoder.train()
    encoder.text_model.eval()
    encoder.text_model.requires_grad_(False)
    encoder.visual_projection.weight.grad = torch.full_like(encoder.visual_projection.weight, 7.0)
    modes = [module.training for module in encoder.modules()]
    needs = [parameter.requires_grad for parameter in encoder.parameters()]
    grads = [parameter.grad for parameter in encoder.parameters()]
    state, before = torch.get_rng_state(), images.clone()
    with attack_mode(encoder):
        attack(CrossEntropy(Logits(classify), labels), images, BALLS["linf"], noise=noise)
    assert [module.training for module in encoder.modules()] == modes
    assert [parameter.requires_grad for parameter in encoder.parameters()] == needs
    assert all(now is then for now, then in zip([p.grad for p in encoder.parameters()], grads))
    assert (encoder.visual_projection.weight.grad == 7).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)
    assert not images.requires_grad


@table
def test_trainable_parameters_get_no_gradient_even_outside_attack_mode(attack, case, encoder):
    classify, images, labels, noise = case
    attack(CrossEntropy(classify, labels), images, BALLS["linf"], noise=noise)
    assert all(parameter.grad is None for parameter in encoder.parameters())


@table
def test_runs_under_no_grad(attack, case):
    classify, images, labels, noise = case
    with torch.no_grad():
        found = attack(CrossEntropy(classify, labels), images, BALLS["linf"], noise=noise)
    assert (found != images).any()


@table
def test_empty_batch(attack, case):
    classify, images, labels, noise = case
    none = torch.zeros(0, dtype=torch.long)
    found = attack(CrossEntropy(classify, labels[none]), images[none], BALLS["linf"], noise=noise.take(none))
    assert found.shape == (0, 3, 32, 32)


@pytest.mark.parametrize("attack", [pgd, apgd])
@pytest.mark.parametrize("ball", [LinfBall(4 / 255), L2Ball(0.5)], ids=["linf", "l2"])
def test_bf16_autocast_stays_inside_the_ball_in_fp32(attack, ball, case):
    classify, images, labels, noise = case

    def objective(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return CrossEntropy(classify, labels)(x)

    found = attack(objective, images, ball, steps=5, noise=noise)
    assert found.dtype == torch.float32
    assert (ball.distance(found, images) <= ball.eps * (1 + 1e-6) + 1e-7).all()
    with torch.no_grad():
        assert (objective(found) > objective(images)).all()


@pytest.mark.parametrize("attack", [pgd, apgd])
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
        ({"steps": 1, "restarts": 0}, "restarts"),
        ({"steps": 1, "restarts": 2}, "noise"),
    ],
)
def test_settings_that_do_less_than_asked_are_refused(attack, settings, said):
    with pytest.raises(ValueError, match=said):
        attack(lambda x: x.flatten(1).sum(1), torch.zeros(1, 3, 2, 2), LinfBall(0.1), **settings)


@pytest.mark.parametrize("size", [float("inf"), float("nan"), -0.1, 0.0, 8.0])
def test_steps_that_are_none_are_refused(size):
    """findings-reliability 8: an endless step, and one in 0-255 units."""
    with pytest.raises(ValueError, match="step_size"):
        pgd(lambda x: x.flatten(1).sum(1), torch.zeros(1, 3, 2, 2), LinfBall(0.1), steps=1, step_size=size)


def test_fab_must_know_what_fools():
    with pytest.raises(ValueError, match="fooled="):
        fab(lambda x: x.flatten(1).sum(1), torch.zeros(1, 3, 2, 2), LinfBall(0.1), steps=1, fooled=None)


def test_objective_must_be_per_image():
    with pytest.raises(ValueError, match="one loss per image"):
        pgd(lambda x: x.mean(), torch.zeros(2, 3, 2, 2), LinfBall(0.1), steps=1)
