"""A compiled step of PGD: the plain one, in one graph."""

from __future__ import annotations

import pytest
import torch

from hf_robust_vision.attacks import (
    CompiledStep,
    CrossEntropy,
    L2Ball,
    LinfBall,
    NonFiniteGradientWarning,
    StartNoise,
    pgd_last,
)


@pytest.fixture
def model():
    torch._dynamo.reset()
    layers = torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 5)
    return torch.nn.Sequential(*layers).double().requires_grad_(False)


@pytest.mark.parametrize("ball", [LinfBall(8 / 255), L2Ball(0.5)])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_is_the_step(backend, ball, model):
    """Two batches with labels of their own, four steps each."""
    step = CompiledStep(backend)
    for seed in range(2):
        images, labels = torch.rand(3, 3, 8, 8, dtype=torch.float64), torch.tensor([seed, 1, 4])
        objective, noise = CrossEntropy(model, labels), StartNoise(seed, [3, 1, 2])
        plain, compiled = (
            pgd_last(objective, images, ball, steps=4, noise=noise, **how) for how in ({}, {"step": step})
        )
        assert (plain - compiled).abs().max() < 1e-12
        assert (plain - images).abs().max() > 1e-3
        assert not compiled.requires_grad


def test_gradients_that_are_not_finite_are_counted(model):
    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    images[1, 0, 0, 0] = 0.0  # where the root has no slope

    def objective(at):
        return model(at).square().sum(1) + at[:, 0, 0, 0].sqrt()

    with pytest.warns(NonFiniteGradientWarning, match="1 of 3 image gradients"):
        pgd_last(objective, images, LinfBall(8 / 255), steps=1, step=CompiledStep("eager"))


def test_a_break_of_the_graph_is_an_error(model):
    def objective(at):
        return model(at).sum(1) if at.sum().item() > 0 else at.flatten(1).sum(1)

    images = torch.rand(3, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        pgd_last(objective, images, LinfBall(8 / 255), steps=1, step=CompiledStep("eager"))
