"""A linear objective has its optimum in closed form."""

from __future__ import annotations

import pytest
import torch

from hf_robust_vision.attacks import L2Ball, LinfBall, StartNoise, apgd, fgsm, pgd, pgd_last


IMAGES = 0.5 + 0.05 * torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))
SLOPE = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(2))
BALLS = {"linf": LinfBall(0.1), "l2": L2Ball(0.5)}


def linear(images):
    return (images * SLOPE).flatten(1).sum(1)


def optimum(norm: str) -> torch.Tensor:
    if norm == "linf":
        return IMAGES + 0.1 * SLOPE.sign()
    return IMAGES + 0.5 * SLOPE / SLOPE.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("noise", [None, StartNoise(0, range(4))], ids=["clean-start", "noise"])
@pytest.mark.parametrize("attack", [pgd, apgd])
def test_linear_optimum(attack, noise, norm):
    ball = BALLS[norm]
    size = {"step_size": ball.eps / 4} if attack is pgd else {}  # along a sphere small steps end far from the top
    found = attack(linear, IMAGES, ball, steps=100, noise=noise, **size)
    torch.testing.assert_close(linear(found), linear(optimum(norm)), rtol=0, atol=2e-3)
    torch.testing.assert_close(found, optimum(norm), rtol=0, atol=1e-6 if norm == "linf" else 0.01)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_fgsm_is_the_optimum_in_one_step(norm):
    torch.testing.assert_close(fgsm(linear, IMAGES, BALLS[norm]), optimum(norm), rtol=0, atol=1e-6)


def test_optimum_is_cut_at_black_and_white():
    images = torch.cat([torch.zeros(2, 3, 6, 6), torch.ones(2, 3, 6, 6)])
    found = apgd(linear, images, LinfBall(0.1), steps=20)
    torch.testing.assert_close(found, (images + 0.1 * SLOPE.sign()).clamp(0, 1), rtol=0, atol=1e-6)


def test_fgsm_with_noise_takes_a_longer_step():
    noise = StartNoise(0, range(4))
    ball = BALLS["linf"]
    start = ball.start(IMAGES, noise.draw(IMAGES))
    wanted = ball.project(start + 1.25 * ball.eps * SLOPE.sign(), IMAGES)
    torch.testing.assert_close(fgsm(linear, IMAGES, ball, noise=noise), wanted)


def test_pgd_gives_the_best_iterate_and_pgd_last_the_last_one():
    """One step of 3 * eps overshoots the top of a hill: the best iterate is the start, the last is not."""

    def hill(images):
        return -(images - IMAGES).square().flatten(1).sum(1)

    noise, ball = StartNoise(0, range(4)), BALLS["linf"]
    start = ball.start(IMAGES, noise.draw(IMAGES))
    best = pgd(hill, IMAGES, ball, steps=1, step_size=0.3, noise=noise)
    last = pgd_last(hill, IMAGES, ball, steps=1, step_size=0.3, noise=noise)
    torch.testing.assert_close(best, start)
    assert (hill(last) < hill(start)).all()
