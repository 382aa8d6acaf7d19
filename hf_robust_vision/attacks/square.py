"""Square: random search with square-shaped changes. It asks for losses only, never for a gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .balls import Ball
from .noise import StartNoise
from .objectives import Objective, Success
from .search import Run, Search, check_count


# The squares shrink as steps of a descent do: large ones find the region, small ones the detail, and late in the search
# a large change undoes more than it wins. The share of the area that they cover is halved after those proposals.
FIRST_SHARE, HALVINGS = 0.8, (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
TILES = 5  # per side of the image, at the start in an L2 ball
BLOCK = 100  # proposals whose random numbers are drawn at once: one by one they would cost more than a small model


def square(
    objective: Objective,
    images: Tensor,
    ball: Ball,
    *,
    noise: StartNoise,
    queries: int = 5000,
    restarts: int = 1,
    fooled: Success | None = None,
) -> Tensor:
    """Raise an objective inside a ball by random squares, of which each is kept if it helps.

    Every image has squares of its own, drawn from its own noise, so a result does not depend on the batch. `queries`
    are of the model, per image and restart, the start among them. The objective, `Margin` in the paper, needs no
    gradient. Everything else is as in `pgd`.

    Raises:
        ValueError: If a setting makes no sense.

    Reference:
        Andriushchenko et al. 2020, https://huggingface.co/papers/1912.00049, algorithms 1 to 3.
    """
    # Deviation: the paper stretches its schedule of sizes with the budget; the standard AutoAttack does not, nor do we. So
    # the first proposals are the same whatever the budget is.
    check_count("queries", queries)
    search = Search(objective, images, ball, noise, restarts, fooled)
    squares = _L2Squares(ball) if ball.norm == "l2" else _LinfSquares(ball)
    with torch.no_grad():
        for run in search.runs():
            _one_run(run, squares, queries)
    return search.result()


def _one_run(run: Run, squares: _LinfSquares | _L2Squares, queries: int) -> None:
    assert run.noise is not None
    channels, height, width = run.images.shape[1:]
    device = run.images.device
    numbers = run.noise.uniform(squares.start_shape(channels, width), run.restart, "square-start", device=device)
    best = squares.start(run.images, numbers.to(run.images))
    losses = run.objective(best)
    going = run.offer(best, losses)
    table = torch.empty(0, device=device)
    for proposal in range(queries - 1):
        if going is not None:
            if len(going) == 0:
                return
            run.keep(going)
            best, losses, table = best[going], losses[going], table[going] if len(table) else table
        if proposal % BLOCK == 0:
            block = (BLOCK, squares.numbers(channels))
            table = run.noise.uniform(block, run.restart, "square", proposal // BLOCK, device=device)
        share = FIRST_SHARE / 2 ** sum(proposal > halving for halving in HALVINGS)
        side = squares.side(math.sqrt(share * height * width), min(height, width))
        proposed = squares.propose(best, run.images, side, table[:, proposal % BLOCK])
        found = run.objective(proposed)
        going = run.offer(proposed, found)
        better = found > losses
        best, losses = torch.where(better.view(-1, 1, 1, 1), proposed, best), torch.where(better, found, losses)


# What a start and a proposal look like in each norm. Numbers are uniform in [0, 1), one row an image: `start_shape` and
# `numbers` say how many of them a start and a proposal take.


@dataclass(frozen=True)
class _LinfSquares:
    """Algorithm 2: each channel of a square goes to the lower or the upper end of its range."""

    ball: Ball

    def start_shape(self, channels: int, width: int) -> tuple[int, ...]:  # one sign a channel and column
        return channels, 1, width

    def start(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Vertical stripes."""
        # The paper's start: convolutional networks are weakest against them. They lie at the edge of the ball, as every
        # later proposal does, so that no query is spent on small changes.
        return self.ball.project(images + self.ball.eps * _signs(numbers), images)

    def numbers(self, channels: int) -> int:  # the corner and one sign a channel
        return 2 + channels

    def side(self, wanted: float, most: int) -> int:
        return min(max(round(wanted), 1), most)

    def propose(self, best: Tensor, images: Tensor, side: int, numbers: Tensor) -> Tensor:
        """A square of one colour."""
        # Painted over what was there, not added to it: every pixel stays at an end of its range, where the highest point
        # of a nearly linear objective lies.
        colour = _signs(numbers[:, 2:]).to(images.dtype)[:, :, None, None]
        painted = self.ball.project(images + self.ball.eps * colour, images)
        return torch.where(_inside(*_offsets(numbers[:, :2], side, images), side), painted, best)


@dataclass(frozen=True)
class _L2Squares:
    """Algorithm 3: the budget of one window moves to another, as a bright hill beside a dark one."""

    ball: Ball

    def start_shape(self, channels: int, width: int) -> tuple[int, ...]:  # a sign a channel and tile, and its way
        return channels + 1, TILES, TILES

    def start(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Five by five tiles."""
        height, width = images.shape[2:]
        side = max(min(height, width) // TILES, 1)
        hills = _hills(side, images)
        tall, wide = min(TILES, height // side), min(TILES, width // side)
        lying = numbers[:, -1:, :tall, :wide, None, None] < 0.5
        tiles = _signs(numbers[:, :-1, :tall, :wide, None, None]) * torch.where(lying, hills.T, hills)
        mosaic = tiles.permute(0, 1, 2, 4, 3, 5).flatten(4, 5).flatten(2, 3)
        perturbation = torch.zeros_like(images)
        top, left = (height - tall * side) // 2, (width - wide * side) // 2
        perturbation[:, :, top : top + tall * side, left : left + wide * side] = mosaic
        return self.ball.project(images + self.ball.eps * self.ball.ascend(perturbation), images)

    def numbers(self, channels: int) -> int:  # two corners, which way the hills lie, and one sign a channel
        return 5 + channels

    def side(self, wanted: float, most: int) -> int:
        # Odd, so that a hill has a middle, and three at least, where the image has them, so that it has a slope.
        return min(max(round(wanted), 3) | 1, most)

    def propose(self, best: Tensor, images: Tensor, side: int, numbers: Tensor) -> Tensor:
        """Add hills to the first window, with the budget of both windows and what the ball has left."""
        # In an L2 ball a change has to be paid for: the second window is set back to the clean image, and its share of the
        # squared length, with what the ball has left, goes to the first. So the perturbation stays at the edge of the ball
        # without a projection that would fade all of it. Hills, because a plain square spends as much on its rim.
        down, right = _offsets(numbers[:, :2], side, images)
        here = _inside(down, right, side)
        there = _inside(*_offsets(numbers[:, 2:4], side, images), side)
        lying = numbers[:, 4, None, None] < 0.5
        hills, rows, columns = _hills(side, images), down.clamp(0, side - 1), right.clamp(0, side - 1)
        pattern = torch.where(lying, hills[columns, rows], hills[rows, columns])[:, None] * here
        signs = _signs(numbers[:, 5:]).to(images.dtype)[:, :, None, None]
        perturbation = best - images
        left = (self.ball.eps**2 - perturbation.square().sum((1, 2, 3), keepdim=True)).clamp_min(0) / images.shape[1]
        budget = (left + (perturbation * (here | there)).square().sum((2, 3), keepdim=True)).sqrt()
        mixed = _unit(signs * pattern + _unit(perturbation * here))
        moved = torch.where(here, budget * mixed, torch.where(there, 0, perturbation))
        return self.ball.project(images + moved, images)


def _signs(numbers: Tensor) -> Tensor:
    return torch.where(numbers < 0.5, -1.0, 1.0)


def _offsets(corner: Tensor, side: int, images: Tensor) -> tuple[Tensor, Tensor]:
    """How far each row, and each column, of each image lies below and right of its square's corner."""
    sizes = images.shape[2:]
    # One number of [0, 1) chooses among all corners where the square fits; rounding may make the last one too many.
    places = [(corner[:, i] * (size - side + 1)).long().clamp_max(size - side) for i, size in enumerate(sizes)]
    down, right = (torch.arange(size, device=images.device) - place[:, None] for size, place in zip(sizes, places))
    return down[:, :, None], right[:, None, :]


def _inside(down: Tensor, right: Tensor, side: int) -> Tensor:
    """The square as a mask, shape (batch, 1, height, width)."""
    return ((down >= 0) & (down < side) & (right >= 0) & (right < side))[:, None]


def _hills(side: int, like: Tensor) -> Tensor:
    """A bright hill above an equally strong dark one, together of length 1, shape (side, side)."""
    hills = torch.cat([_hill(side // 2, side, like), -_hill(side - side // 2, side, like)])
    return hills / hills.square().sum().sqrt()


def _hill(height: int, width: int, like: Tensor) -> Tensor:
    """Terraces: the pixels at most k from the middle are raised by 1 / (k + 1)^2, for every k that fits; length 1."""
    levels = max(height, width) // 2 + 1
    steps = 1 / torch.arange(1, levels + 1, device=like.device, dtype=like.dtype).square()
    heights = steps.flip(0).cumsum(0).flip(0)
    rows, columns = (torch.arange(size, device=like.device) - size // 2 for size in (height, width))
    hill = heights[torch.maximum(rows.abs()[:, None], columns.abs()[None, :])]
    return hill / hill.square().sum().sqrt()


def _unit(tensor: Tensor) -> Tensor:
    """Each channel of each image at length 1; zero stays zero."""
    length = tensor.square().sum((2, 3), keepdim=True).sqrt()
    return tensor / length.clamp_min(torch.finfo(tensor.dtype).tiny)
