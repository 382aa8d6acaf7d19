"""Which attacks a vision-language model meets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_robust_vision.attacks import Attack, Ball, Objective, StartNoise, Success, apgd, pgd


ALGORITHMS: dict[str, Callable[..., Tensor]] = {"pgd": pgd, "apgd": apgd}
OBJECTIVES = ("nll", "margin")


@dataclass(frozen=True)
class VLMProtocol:
    """How the robustness of what a model says is measured.

    Args:
        eps: Radii, measured in rising order; a sample that fell stays fallen.
        norm: "linf" or "l2".
        steps: Gradient steps per restart.
        restarts: Random starts for each objective.
        objectives: "nll" (loss of a text) and "margin" (best other token minus the text's, at its weakest token), run
            in order on the samples that still stand.
        batch_size: Samples attacked at once.
        seed: Of the random starts.
        algorithm: "pgd" or "apgd".

    Raises:
        ValueError: If there is no such algorithm or objective.
    """

    eps: tuple[float, ...]
    norm: str = "linf"
    steps: int = 50
    restarts: int = 2
    objectives: tuple[str, ...] = OBJECTIVES
    batch_size: int = 32
    seed: int = 0
    algorithm: str = "pgd"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"unknown algorithm {self.algorithm!r}; choose one of {list(ALGORITHMS)}.")
        strange = [name for name in self.objectives if name not in OBJECTIVES]
        if strange or not self.objectives:
            raise ValueError(f"unknown objectives {strange or self.objectives}; choose among {OBJECTIVES}.")

    @property
    def name(self) -> str:
        """What results call the protocol."""
        return f"vlm-{self.algorithm}-{self.steps}"

    def attacks(self) -> list[Attack]:
        """The attacks in order."""
        return [
            Attack(f"{self.algorithm}-{self.steps}-{name}", self.algorithm, name, self.steps, self.restarts)
            for name in self.objectives
        ]


def run_attack(
    attack: Attack, objective: Objective, fooled: Success | None, images: Tensor, ball: Ball, noise: StartNoise
) -> Tensor:
    """Adversarial images of one attack, of the shape of `images`."""
    run = ALGORITHMS[attack.algorithm]
    return run(objective, images, ball, steps=attack.steps, restarts=attack.restarts, noise=noise, fooled=fooled)


def describe(
    attack: Attack, ball: Ball, how: VLMProtocol, *, target: str | None, resolution: int | str, dtype: str
) -> dict[str, Any]:
    """An attack as a plain dictionary, for a result."""
    adaptive = attack.algorithm == "apgd"
    return {
        "name": attack.name,
        "algorithm": attack.algorithm,
        "objective": attack.objective,
        "target": target,
        "steps": attack.steps,
        "step_size": "adaptive, first 2 * eps" if adaptive else min(2.5 / max(attack.steps, 1), 1.25) * ball.eps,
        "restarts": attack.restarts,
        "resolution": resolution,
        "seed": how.seed,
        "dtype": dtype,
    }
