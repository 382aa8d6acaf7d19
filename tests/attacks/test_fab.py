"""FAB: the shortest way to a plane inside the box, and the nearest fooling image."""

from __future__ import annotations

import math

import pytest
import torch

from hf_robust_vision.attacks import (
    L2Ball,
    LinfBall,
    Logits,
    Misclassified,
    StartNoise,
    TargetedMargin,
    fab,
    make_ball,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


POINTS = torch.sigmoid(2 * random(60, 12))
SLOPES = random(60, 12, seed=1) * (random(60, 12, seed=2) > -1)  # some pixels play no part
HIGHEST = torch.where(SLOPES > 0, 1 - POINTS, -POINTS).mul(SLOPES).sum(1)
LOWEST = torch.where(SLOPES < 0, 1 - POINTS, -POINTS).mul(SLOPES).sum(1)
RISES = torch.lerp(LOWEST, HIGHEST, torch.linspace(0.02, 0.98, 60, dtype=torch.float64))


def test_linf_projection_is_the_one_of_a_linear_program():
    optimize = pytest.importorskip("scipy.optimize")
    moves = LinfBall(1.0).shortest(POINTS, SLOPES, RISES)
    for point, slope, rise, move in zip(POINTS, SLOPES, RISES, moves):
        # Variables: the 12 changes and their largest size t, which is minimised.
        sides = [[*([0.0] * i), sign, *([0.0] * (11 - i)), -1.0] for i in range(12) for sign in (1.0, -1.0)]
        solved = optimize.linprog(
            c=[*([0.0] * 12), 1.0],
            A_ub=sides,
            b_ub=[0.0] * 24,
            A_eq=[[*slope.tolist(), 0.0]],
            b_eq=[float(rise)],
            bounds=[*((-x, 1 - x) for x in point.tolist()), (0, None)],
        )
        assert float(move.abs().max()) == pytest.approx(solved.fun, abs=1e-9)


def test_l2_projection_is_the_one_of_a_bisection():
    """The optimum is clip(multiplier * slope), by its optimality conditions; the multiplier is found by halving."""
    moves = L2Ball(1.0).shortest(POINTS, SLOPES, RISES)
    low, high = torch.full((60, 1), -1e4, dtype=torch.float64), torch.full((60, 1), 1e4, dtype=torch.float64)
    for _ in range(100):
        middle = (low + high) / 2
        clipped = torch.minimum(torch.maximum(middle * SLOPES, -POINTS), 1 - POINTS)
        short = ((clipped * SLOPES).sum(1) < RISES)[:, None]
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    torch.testing.assert_close(moves, clipped, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_reaches_the_plane_inside_the_range(norm):
    moves = make_ball(norm, 1.0).shortest(POINTS, SLOPES, RISES)
    torch.testing.assert_close((moves * SLOPES).sum(1), RISES)
    moved = POINTS + moves
    assert moved.min() > -1e-12
    assert moved.max() < 1 + 1e-12
    assert (moves[SLOPES == 0] == 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_beyond_reach_goes_to_the_corner(norm):
    ball = make_ball(norm, 1.0)
    moves = ball.shortest(POINTS, SLOPES, 2 * HIGHEST)
    torch.testing.assert_close((moves * SLOPES).sum(1), HIGHEST)
    still = ball.shortest(POINTS, torch.zeros_like(SLOPES), RISES)
    assert (still == 0).all()
    assert (ball.shortest(POINTS, SLOPES, 0 * RISES) == 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projection_agrees_with_pyautoattack(norm):
    theirs = pytest.importorskip("pyautoattack.fab_projections")
    project = theirs.projection_linf if norm == "linf" else theirs.projection_l2
    plane = (POINTS * SLOPES).sum(1) + RISES
    wanted = project(POINTS.float(), SLOPES.float(), plane.float())
    moves = make_ball(norm, 1.0).shortest(POINTS.float(), SLOPES.float(), RISES.float())
    torch.testing.assert_close(moves, wanted, rtol=0, atol=2e-5)


IMAGES = 0.5 + 0.02 * random(12, 3, 6, 6, seed=3)
WEIGHT = random(4, 108, seed=4)


def linear(images):
    return (images.flatten(1) - 0.5) @ WEIGHT.T


def curved(images, bend=0.25):
    hidden = torch.tanh(bend * (images.flatten(1) - 0.5) @ random(108, 40, seed=5))
    return hidden @ random(40, 4, seed=6)


def run(classify, images, ball, **settings):
    """FAB towards the strongest wrong class of the model's own answer."""
    logits = Logits(classify)
    order = classify(images).argsort(1, descending=True)
    objective = TargetedMargin(logits, order[:, 0], order[:, 1])
    fooled = Misclassified(logits, order[:, 0])
    return fab(objective, images, ball, fooled=fooled, **settings), order


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_nearest_image_of_a_linear_model_is_known(norm):
    """The distance to a hyperplane is the margin over the dual norm.

    In units of it the first step ends at 1.05, goes back to 0.945, and the second ends at 1.00521: there it stays.
    """
    ball = make_ball(norm, 1.0)
    found, order = run(lambda images: linear(images)[:, :2], IMAGES, ball, steps=10, nearest=True)
    towards = WEIGHT[order[:, 1]] - WEIGHT[order[:, 0]]
    margin = -((IMAGES.flatten(1) - 0.5) * towards).sum(1)
    nearest = margin / towards.norm(p=1 if norm == "linf" else 2, dim=1)
    onward = 0.055 / 1.055  # the share of the step that starts at the clean image
    wanted = (1 - onward) * (0.945 + 1.05 * 0.055) + onward * 1.05
    torch.testing.assert_close(ball.distance(found, IMAGES) / nearest, torch.full_like(nearest, wanted))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_what_lies_outside_the_ball_is_not_returned(norm, seed):
    """And what leaves early is flagged as the full search flags it."""
    images = torch.sigmoid(random(24, 3, 6, 6, seed=seed))
    wide, order = run(curved, images, make_ball(norm, 1.0 if norm == "linf" else 20.0), steps=30, nearest=True)
    distances = make_ball(norm, 1.0).distance(wide, images)
    ball = make_ball(norm, float(distances.median()))
    found, _ = run(curved, images, ball, steps=30)
    fooled = curved(found).argmax(1) != order[:, 0]
    assert torch.equal(fooled, distances <= ball.eps)
    assert (ball.distance(found, images) <= ball.eps).all()
    assert torch.equal(found[~fooled], images[~fooled])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_parity_with_pyautoattack(norm, monkeypatch):
    """The same distances as the independent FAB-T finds, the same in the median to 1 %, and each to 10 %."""
    theirs = pytest.importorskip("pyautoattack.fab_pt")
    images = torch.sigmoid(random(40, 3, 6, 6, seed=7)).float()

    def classify(x):
        return curved(x.double()).float()

    ball = make_ball(norm, 1.0 if norm == "linf" else 20.0)
    found, order = run(classify, images, ball, steps=40, nearest=True)
    other = theirs.FABAttack_PT(
        classify, norm={"linf": "Linf", "l2": "L2"}[norm], n_iter=40, eps=ball.eps, targeted=True, device="cpu"
    )
    other.target_class = 2
    wanted = other.attack_single_run(images, order[:, 0], is_targeted=True)
    ratio = ball.distance(found, images) / ball.distance(wanted, images)
    assert float(ratio.median()) == pytest.approx(1, abs=0.01)
    assert ratio.min() > 0.9
    assert ratio.max() < 1.1


def test_restarts_only_help():
    """On a model so crooked that the run from the clean image misses near boundaries, or finds none."""
    images, noise, ball = torch.sigmoid(random(24, 3, 6, 6)), StartNoise(0, range(24)), LinfBall(0.1)
    distances = []
    for restarts in (1, 3):
        found, order = run(
            lambda x: curved(x, bend=16), images, ball, steps=6, nearest=True, restarts=restarts, noise=noise
        )
        fooled = curved(found, bend=16).argmax(1) != order[:, 0]
        distances.append(torch.where(fooled, ball.distance(found, images), torch.inf))
    assert (distances[1] <= distances[0]).all()
    assert (distances[1] < distances[0]).any()


def test_fooled_images_leave_and_quiet_steps_cost_one_pass():
    """One forward pass a step while nothing is fooled; what is fooled inside the ball is gone."""
    seen = []

    def counted(images):
        seen.append(len(images))
        return linear(images)

    order = linear(IMAGES).argsort(1, descending=True)
    logits = Logits(counted)
    fooled = Misclassified(logits, order[:, 0])
    objective = TargetedMargin(logits, order[:, 0], order[:, 1])
    fab(objective, IMAGES, LinfBall(0.5), fooled=fooled, steps=10)
    assert seen == [12, 12]  # the first step crosses a plane exactly; all fool, all leave
    seen.clear()
    never = Misclassified(
        lambda images: logits(images) * 0 + torch.eye(4, dtype=torch.float64)[order[:, 0]], order[:, 0]
    )
    fab(objective, IMAGES, LinfBall(0.5), fooled=never, steps=10)
    assert seen == [12] * 11


def test_one_gradient_that_is_not_a_number_costs_that_image_only():
    images = IMAGES.clone()

    def broken(x):
        bad = torch.zeros_like(linear(x))
        bad[0] = math.nan
        return linear(x) + bad

    order = linear(images).argsort(1, descending=True)
    objective = TargetedMargin(broken, order[:, 0], order[:, 1])
    found = fab(objective, images, LinfBall(0.5), fooled=Misclassified(broken, order[:, 0]), steps=5)
    assert torch.equal(found[0], images[0])
    assert (linear(found)[1:].argmax(1) != order[1:, 0]).all()
