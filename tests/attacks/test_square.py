"""Square: its optimum on a linear model, its shapes and schedule, its noise, and another implementation beside it."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hf_robust_vision.attacks import (
    CrossEntropy,
    L2Ball,
    LinfBall,
    Logits,
    Margin,
    Misclassified,
    StartNoise,
    make_ball,
    square,
)
from hf_robust_vision.attacks import square as function


module = SimpleNamespace(**function.__globals__)  # the package exports the attack under the name of its file
BALLS = {"linf": LinfBall(0.05), "l2": L2Ball(0.5)}
norms = pytest.mark.parametrize("norm", list(BALLS))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def classifier(size, classes=4):
    """A small network in float64: its flags do not hang on the rounding of a batch."""
    first, last = random(3 * size * size, 32, seed=1), random(32, classes, seed=2)
    return lambda images: torch.tanh((images.double().flatten(1) - 0.5) @ first / 4) @ last


def test_linf_optimum_of_a_linear_model():
    """Every pixel at its end of the range: single pixels are tried once the squares have shrunk to that."""
    images, slope = 0.5 + 0.05 * random(3, 3, 4, 4), random(3, 3, 4, 4, seed=1)

    def objective(x):
        return (x * slope).flatten(1).sum(1)

    found = square(objective, images, LinfBall(0.1), queries=2000, noise=StartNoise(0, range(3)))
    torch.testing.assert_close(found, images + 0.1 * slope.sign())


def test_l2_goes_towards_the_optimum_of_a_linear_model():
    """Never beyond eps times the length of the slope; 300 random looks reach a third of it, the start nothing."""
    images = torch.full((3, 3, 15, 15), 0.5, dtype=torch.float64)
    waves = torch.linspace(0, math.pi, 15, dtype=torch.float64).sin()
    slope = random(3, 3, 1, 1, seed=1) * waves[:, None] * (2 * waves - 1)

    def objective(x):
        return ((x - images) * slope).flatten(1).sum(1)

    ball = L2Ball(0.5)
    reached = []
    for queries in (1, 300):
        found = square(objective, images, ball, queries=queries, noise=StartNoise(0, range(3)))
        torch.testing.assert_close(ball.distance(found, images), torch.full((3,), 0.5, dtype=torch.float64))
        reached.append(objective(found) / (0.5 * slope.flatten(1).norm(dim=1)))
    assert (reached[0] < 0.15).all()
    assert (reached[1] > 0.33).all()
    assert (reached[1] <= 1 + 1e-9).all()


@norms
def test_the_budget_of_looks_is_kept(norm):
    seen = []

    def objective(images):
        assert not torch.is_grad_enabled()
        seen.append(len(images))
        return images.flatten(1).sum(1)

    images = torch.rand(2, 3, 8, 8)
    square(objective, images, BALLS[norm], queries=37, noise=StartNoise(0, range(2)))
    assert seen == [2] * 37
    seen.clear()
    square(objective, images, BALLS[norm], queries=5, restarts=3, noise=StartNoise(0, range(2)))
    assert seen == [2] * 15


@norms
def test_more_looks_only_help_and_begin_the_same(norm):
    images, labels = torch.rand(6, 3, 8, 8), torch.zeros(6, dtype=torch.long)
    objective = CrossEntropy(classifier(8), labels)
    losses = [
        objective(square(objective, images, BALLS[norm], queries=count, noise=StartNoise(0, range(6))))
        for count in (1, 20, 150, 250)
    ]
    assert all((more >= less).all() for less, more in zip(losses, losses[1:]))
    assert (losses[-1] > losses[0]).all()


@norms
def test_it_does_not_depend_on_the_batch(norm):
    """Not on the others in it, their order, the image's place, or who leaves early; nor on the global random state."""
    classify, images = classifier(8), torch.rand(12, 3, 8, 8, dtype=torch.float64)
    labels, noise = classify(images).argmax(1), StartNoise(0, range(12))

    def run(rows, early=True):
        rows = torch.tensor(rows)
        logits = Logits(classify)
        fooled = Misclassified(logits, labels[rows]) if early else None
        settings = {"queries": 120, "noise": noise.take(rows), "fooled": fooled}
        return square(Margin(logits, labels[rows]), images[rows], make_ball(norm, 0.4 * BALLS[norm].eps), **settings)

    state = torch.get_rng_state()
    whole = run(range(12))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    torch.testing.assert_close(run(range(11, -1, -1)).flip(0), whole)
    torch.testing.assert_close(torch.cat([run([row]) for row in range(0, 12, 3)]), whole[::3])
    wrong = classify(whole).argmax(1) != labels
    assert 2 < wrong.sum() < 11
    assert torch.equal(classify(run(range(12), early=False)).argmax(1) != labels, wrong)


@norms
def test_fooled_images_leave_the_batch(norm):
    seen = []

    def classify(images):
        seen.append(len(images))
        return classifier(8)(images)

    images = torch.rand(8, 3, 8, 8)
    labels = classifier(8)(images).argmax(1)
    labels[:4] = (labels[:4] + 1) % 4  # wrong from the start
    logits, ball = Logits(classify), make_ball(norm, 1e-4)
    square(
        Margin(logits, labels), images, ball, queries=6, noise=StartNoise(0, range(8)),
        fooled=Misclassified(logits, labels),
    )  # fmt: skip
    assert seen == [8, *[4] * 5]


def test_schedule_of_sizes(monkeypatch):
    """Sides of a 64 by 64 image: the root of 0.8 of its area, then of half as much after 10, 50, 200 ... proposals."""
    sides = []

    def propose(self, best, images, side, numbers):
        sides.append(side)
        return best

    for squares in (module._LinfSquares, module._L2Squares):
        monkeypatch.setattr(squares, "propose", propose)
        sides.clear()
        image = torch.rand(1, 1, 64, 64)
        ball = LinfBall(0.1) if squares is module._LinfSquares else L2Ball(0.1)
        square(lambda x: x.flatten(1).sum(1), image, ball, queries=8103, noise=StartNoise(0, [0]))
        wanted = [round(math.sqrt(0.8 / 2**k) * 64) for k in range(10)]
        if ball.norm == "l2":
            wanted = [max(side, 3) | 1 for side in wanted]
        starts = [0, 11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001]
        assert [sides[i] for i in starts] == wanted
        assert [sides[i - 1] for i in starts[1:]] == wanted[:-1]


def test_a_linf_proposal_paints_one_square():
    ball, images = LinfBall(0.1), 0.2 + 0.6 * torch.rand(200, 3, 9, 7, dtype=torch.float64)
    best = ball.project(images + 0.03, images)
    numbers = StartNoise(0, range(200)).uniform((5,), "test")
    changed = module._LinfSquares(ball).propose(best, images, 3, numbers) != best
    rows, columns = changed.any(1).any(2), changed.any(1).any(1)
    assert (rows.sum(1) == 3).all()
    assert (columns.sum(1) == 3).all()
    assert (changed.flatten(1).sum(1) == 27).all()
    tops, lefts = rows.int().argmax(1), columns.int().argmax(1)
    assert set(tops.tolist()) == set(range(7))  # every place in reach, the last ones too
    assert set(lefts.tolist()) == set(range(5))


def test_an_l2_proposal_moves_budget_and_stays_on_the_sphere():
    ball, images = L2Ball(0.5), torch.full((50, 3, 15, 15), 0.5, dtype=torch.float64)
    numbers = StartNoise(0, range(50)).uniform((8,), "test")
    squares = module._L2Squares(ball)
    best = squares.start(images, StartNoise(0, range(50)).uniform(squares.start_shape(3, 15), "start"))
    sphere = torch.full((50,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(ball.distance(best, images), sphere)
    assert (best != images).all()
    moved = squares.propose(best, images, 5, numbers)
    torch.testing.assert_close(ball.distance(moved, images), sphere)
    assert (((moved - best).abs() > 1e-9).flatten(1).sum(1) <= 3 * 50).all()  # two windows of 25 pixels
    emptied = (moved - images).abs().flatten(1) < 1e-9  # the second window has given its budget away
    assert (emptied.sum(1) == 3 * 25).any()


def test_hills_are_those_of_pyautoattack():
    theirs = pytest.importorskip("pyautoattack.square").SquareAttack(None, norm="L2", eps=1.0, device="cpu")
    torch.manual_seed(0)
    for side in (1, 2, 3, 5, 6, 11, 44):
        hills = module._hills(side, torch.zeros(1))
        wanted = theirs.eta(side)
        assert torch.allclose(hills, wanted) or torch.allclose(hills.T, wanted)


@norms
def test_parity_with_pyautoattack(norm, monkeypatch):
    """Success rates on 300 samples at two radii: at most 6 points apart, which is 3 deviations of either.

    Their squares never reach the last row and column, against the paper; here they may, so that both search the same.
    """
    theirs = pytest.importorskip("pyautoattack.square")
    reach = lambda self, low=0, high=1, shape=(1,): torch.randint(low, high + 1, tuple(shape))  # noqa: E731
    monkeypatch.setattr(theirs.SquareAttack, "random_int", reach)
    images = torch.rand(300, 3, 10, 10, generator=torch.Generator().manual_seed(3))
    classify = classifier(10)
    labels = classify(images).argmax(1)
    for scale in (0.4, 0.8):
        ball, logits = make_ball(norm, BALLS[norm].eps * scale), Logits(classify)
        settings = {"queries": 100, "noise": StartNoise(0, range(300)), "fooled": Misclassified(logits, labels)}
        found = square(Margin(logits, labels), images, ball, **settings)
        ours = (classify(found).argmax(1) != labels).float().mean()
        other = theirs.SquareAttack(
            classify,
            norm={"linf": "Linf", "l2": "L2"}[norm],
            n_queries=100,
            eps=ball.eps,
            resc_schedule=False,
            device="cpu",
        )
        wanted = (classify(other.perturb(images, labels)).argmax(1) != labels).float().mean()
        assert 0.1 < wanted < 0.9, "a radius where nothing can differ tests nothing"
        assert abs(float(ours - wanted)) < 0.06


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4), (5, 12)])
@norms
def test_tiny_and_oblong_images(norm, size):
    images = torch.rand(3, 3, *size)
    ball = BALLS[norm]
    found = square(lambda x: x.flatten(1).sum(1), images, ball, queries=250, noise=StartNoise(0, range(3)))
    assert found.shape == images.shape
    assert (ball.distance(found, images) <= ball.eps * (1 + 1e-6)).all()
    assert found.min() >= 0
    assert found.max() <= 1


@pytest.mark.parametrize(("settings", "said"), [({"queries": 0}, "queries"), ({"restarts": 0}, "restarts")])
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(ValueError, match=said):
        square(lambda x: x.sum(), torch.rand(1, 3, 4, 4), LinfBall(0.1), noise=StartNoise(0, [0]), **settings)
