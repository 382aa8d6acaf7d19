"""Which attacks a vision-language model meets."""

from __future__ import annotations

from dataclasses import dataclass

from hf_robust_vision.attacks import Attack


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
        ValueError: If there is no such algorithm or objective, or an attack would do nothing.
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
        strange = [name for name in self.objectives if name not in OBJECTIVES]
        if strange or not self.objectives:
            raise ValueError(f"unknown objectives {strange or self.objectives}; choose among {OBJECTIVES}.")
        self.attacks()

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
