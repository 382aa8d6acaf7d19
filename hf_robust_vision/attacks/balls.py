"""The sets that a perturbation may move in: where it starts, which way is up, and how it comes back inside."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ball(ABC):
    """All images in [0, 1] within `eps` of an image.

    Args:
        eps: Radius. For `LinfBall` in pixels of [0, 1] (4/255, not 4); for `L2Ball` the Euclidean norm of the
            perturbation over the whole [0, 1] image.

    Raises:
        ValueError: If `eps` is no length, see `check_length`.
    """

    eps: float
    norm: ClassVar[str]  # its name, as results record it

    def __post_init__(self) -> None:
        check_length("eps", self.eps, self.norm)

    @abstractmethod
    def start(self, images: Tensor, noise: Tensor) -> Tensor:
        """A random point of the ball, from uniform `noise` in (-1, 1) of the shape of `images`."""

    @abstractmethod
    def ascend(self, gradient: Tensor) -> Tensor:
        """The direction of length 1 in this norm along which a linear function rises most."""

    @abstractmethod
    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """The point of the ball around `images`, cut to [0, 1], that takes the place of `adversarial`."""

    @abstractmethod
    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Length of each perturbation in this norm, shape (batch,)."""

    @abstractmethod
    def pull(self, slope: Tensor) -> Tensor:
        """How far each pixel of a shortest perturbation goes while none has met black or white, up to a factor.

        `slope` is the absolute gradient of the linear function that the perturbation raises.
        """

    def shortest(self, images: Tensor, gradient: Tensor, rise: Tensor) -> Tensor:
        """The shortest perturbation that raises a linear function by `rise` and leaves the images in [0, 1].

        `gradient` is that of the function, `rise` has shape (batch,) and may be negative, and `eps` plays no part. Where
        no image in [0, 1] is high enough, the perturbation leads to the highest corner.
        """
        # The pixels move together, each by its `pull`, until one meets black or white and stays there; the others then
        # have to go further for it. FAB's code sorts all pixels by when they would meet; here each round fixes all that
        # would leave the range at this pace, which gives the same after a few rounds.
        ascent = (gradient * rise.view(-1, *[1] * (images.ndim - 1)).sign()).flatten(1)
        room = torch.where(ascent > 0, 1 - images.flatten(1), images.flatten(1))
        slope = ascent.abs()
        pull = self.pull(slope)
        free = slope > 0
        while True:
            still_wanted = rise.abs() - (slope * room).masked_fill(free, 0).sum(1)
            pace = (slope * pull).masked_fill(~free, 0).sum(1)
            way = torch.where(pace > 0, still_wanted / pace, torch.inf)[:, None] * pull
            # Pixels only ever become fixed, so that this ends, at the latest with none free.
            inside = free & (way < room)
            if torch.equal(inside, free):
                break
            free = inside
        return (torch.where(free, way, room) * ascent.sign()).view_as(images)


@dataclass(frozen=True)
class LinfBall(Ball):
    """No pixel changes by more than `eps`."""

    norm = "linf"

    def start(self, images: Tensor, noise: Tensor) -> Tensor:
        """A uniform point of the cube."""
        return self.project(images + (self.eps * noise).to(images.dtype), images)

    def ascend(self, gradient: Tensor) -> Tensor:
        """The sign of the gradient."""
        return gradient.sign()

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Clip every pixel to within `eps` of the image and to [0, 1]."""
        # Two boxes with parallel sides: clipped to one after the other, in any order, a point lands on the nearest point of
        # both. That is not so in an L2 ball.
        # Against fixed bounds: a difference that is cut and added again would be rounded anew in every step, and creep.
        nearby = torch.minimum(torch.maximum(adversarial, images - self.eps), images + self.eps)
        return nearby.clamp(0, 1)

    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Largest pixel change of each image, shape (batch,)."""
        return (adversarial - images).abs().flatten(1).amax(1)

    def pull(self, slope: Tensor) -> Tensor:
        """The same for every pixel."""
        return torch.ones_like(slope)


@dataclass(frozen=True)
class L2Ball(Ball):
    """The Euclidean length of the perturbation is at most `eps`."""

    norm = "l2"

    def start(self, images: Tensor, noise: Tensor) -> Tensor:
        """A uniform direction at radius `eps`, where nearly all of a high-dimensional ball lies."""
        # Normal values of one variance, which `erfinv` makes of uniform ones, point nowhere in particular. The last digits
        # may differ between devices, as those of `erfinv` do.
        return self.project(images + (self.eps * self.ascend(torch.erfinv(noise))).to(images.dtype), images)

    def ascend(self, gradient: Tensor) -> Tensor:
        """The gradient at length 1; zero where the gradient is zero."""
        return gradient / _lengths(gradient).clamp_min(torch.finfo(gradient.dtype).tiny)

    def project(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Shorten the perturbation to `eps`, then clip to [0, 1], which can only shorten it further."""
        # In this order, because the clean image lies in [0, 1]: a clip moves each pixel towards it, so that the result lies
        # in both sets. Clipped first and shortened then it would lie in both as well, but a pixel that was cut at white
        # would be drawn away from there again. Neither is the nearest point of both sets, which would take an iteration.
        perturbation = adversarial - images
        shrink = self.eps / _lengths(perturbation).clamp_min(self.eps if self.eps > 0 else 1.0)
        return (images + perturbation * shrink).clamp(0, 1)

    def distance(self, adversarial: Tensor, images: Tensor) -> Tensor:
        """Euclidean length of each perturbation, shape (batch,)."""
        return _lengths(adversarial - images).flatten()

    def pull(self, slope: Tensor) -> Tensor:
        """The slope itself."""
        return slope


def make_ball(norm: str, eps: float) -> Ball:
    """The ball of a norm's name, for command lines and files.

    Raises:
        ValueError: If `norm` is not "linf" or "l2".
    """
    balls: dict[str, type[Ball]] = {"linf": LinfBall, "l2": L2Ball}
    if norm.lower() not in balls:
        raise ValueError(f"unknown norm {norm!r}; choose one of {', '.join(map(repr, balls))}.")
    return balls[norm.lower()](eps)


def check_length(name: str, value: float, norm: str, *, zero: bool = True) -> None:
    """Refuse a radius or a step that is not one.

    Raises:
        ValueError: If it is negative, not finite, 0 where that is not allowed, or over 1 for "linf", where it looks
            like 0-255 units.
    """
    if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be a finite number {'of at least' if zero else 'above'} 0, got {value}.")
    if norm.lower() == "linf" and value > 1:
        raise ValueError(
            f"{name}={value:g} is over 1, but images lie in [0, 1]; for 0-255 units type {name}={value:g}/255."
        )


def _lengths(tensor: Tensor) -> Tensor:
    # Scaled by the largest entry: the square of a small gradient underflows in low precision and in float32.
    flat = tensor.flatten(1)
    largest = flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(tensor.dtype).tiny)
    length: Tensor = torch.linalg.vector_norm(flat / largest, dim=1, keepdim=True)
    return (largest * length).view(-1, 1, 1, 1)
