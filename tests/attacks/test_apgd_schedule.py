"""APGD against a plain reading of the published algorithm, one image at a time in Python numbers and lists."""

from __future__ import annotations

import pytest
import torch

from hf_robust_vision.attacks import L2Ball, LinfBall, StartNoise, apgd


WIDTH = 3 * 4 * 4
MATRIX = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
IMAGES = 0.2 + 0.6 * torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def wavy(images):
    """Many hills within the ball, so that the step must shrink."""
    return (torch.sin(1.5 * images.flatten(1) @ MATRIX.T) * torch.linspace(1, 2, WIDTH)).sum(1)


def published(objective, image, eps, norm, steps, start):
    """Croce and Hein 2020, algorithm 1, with the constants of their code: visited losses and the best image."""

    def project(point):
        if norm == "linf":
            return torch.minimum(torch.maximum(point, image - eps), image + eps).clamp(0, 1)
        move = point - image
        length = move.norm()
        return (image + move / length * min(eps, length)).clamp(0, 1) if length > 0 else point

    def direction(gradient):
        return gradient.sign() if norm == "linf" else gradient / gradient.norm()

    def ask(point):
        point = point.clone().requires_grad_(True)
        value = objective(point)[0]
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient

    step = 2 * eps
    x_old = x = start
    loss, gradient = ask(x)
    losses, steps_taken = [loss], [step]
    best, best_gradient, best_loss = x, gradient, loss
    loss_at_check, halved_before = loss, True
    window = max(int(0.22 * steps), 1)
    counter = 0
    for number in range(steps):
        weight = 0.75 if number > 0 else 1.0
        z = project(x + step * direction(gradient))
        x_new = project(x + weight * (z - x) + (1 - weight) * (x - x_old))
        x_old, x = x, x_new
        loss, gradient = ask(x)
        losses.append(loss)
        if loss > best_loss:
            best, best_gradient, best_loss = x, gradient, loss
        counter += 1
        if counter == window:
            recent = losses[-window - 1 :]
            rises = sum(later > earlier for earlier, later in zip(recent, recent[1:]))
            halve = rises <= 0.75 * window or (not halved_before and loss_at_check >= best_loss)
            halved_before, loss_at_check = halve, best_loss
            if halve:
                step /= 2
                x, gradient = best, best_gradient
            counter = 0
            window = max(window - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1))
        steps_taken.append(step)
    return losses, best, steps_taken


@pytest.mark.parametrize("steps", [1, 5, 20, 50, 100])
@pytest.mark.parametrize("ball", [LinfBall(0.1), L2Ball(0.7)], ids=["linf", "l2"])
@pytest.mark.parametrize("noise", [None, StartNoise(3, range(6))], ids=["clean-start", "noise"])
def test_every_loss_on_the_way(ball, steps, noise):
    seen = []

    def watched(images):
        losses = wavy(images)
        seen.append(losses.detach())
        return losses

    found = apgd(watched, IMAGES, ball, steps=steps, noise=noise)
    visited = torch.stack(seen)
    start = IMAGES if noise is None else ball.start(IMAGES, noise.draw(IMAGES))
    halvings = 0
    for row in range(len(IMAGES)):
        image = IMAGES[row : row + 1]
        losses, best, sizes = published(wavy, image, ball.eps, ball.norm, steps, start[row : row + 1])
        torch.testing.assert_close(visited[:, row], torch.tensor(losses, dtype=torch.float64), rtol=0, atol=1e-7)
        torch.testing.assert_close(found[row : row + 1], best, rtol=0, atol=1e-8)
        halvings += len(set(sizes)) - 1
    assert steps < 20 or halvings > 6, "a schedule that never shrinks tests nothing"
