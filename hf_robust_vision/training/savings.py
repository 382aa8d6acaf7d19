"""Arguments that save passes of the training attack."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import TrainingArguments


# The recommended fast setting: what `fast` sets.
FAST: dict[str, Any] = {
    "attack_steps": 2,
    "attack_step_size": None,
    "attack_random_start": True,
    "attack_token_share": 0.5,
    "bf16": True,
}


class AttackPlan(NamedTuple):
    """The attack of one update: gradient steps, their length (None: the default), how much of the images they see."""

    steps: int
    step_size: float | None
    token_share: float
    low_resolution: bool


@dataclass
class SavingArguments(TrainingArguments):
    """Arguments that save passes of the training attack; every method takes them.

    Args:
        fast: The recommended fast setting, over whatever else a file or a call gives for the arguments that it decides (a
            command line that types one of them is refused): 2 attack steps of the default length from a random start,
            each on half of the patch tokens, and bf16. A tower that can not drop tokens sees all.
        attack_token_share: Each step of the training attack sees another part of the patch tokens, see `TokenShare`;
            for CLIP and SigLIP towers, and not for what a language model reads.
        attack_resolution: Each step of the training attack sees the images at this many pixels a side, see
            `LowResolution`, and changes them at their own; for CLIP and SigLIP towers, and feature pooled.
        carry_starts_mb: MiB of memory of each process for the perturbations of samples, from which their next attack
            starts, see `CarriedStarts`; 0 starts afresh. For "linf", and data that is the same at every epoch.
        attack_free_step: Each remembered perturbation takes one step more along the gradient that the learner's own
            backward pass leaves at the pixels, which costs no pass (Shafahi et al. 2019,
            https://huggingface.co/papers/1904.12843, with the next epoch in the place of a replay). The loss is that of
            the learner. With it `attack_steps` may be 0.
        attack_cheap_until: For this share of the updates, from the first, an attack takes one step (with
            `attack_free_step` none of its own) of the default length on `attack_token_share` of the tokens or at
            `attack_resolution`; from then on `attack_steps` steps on whole images. After Cai et al. 2018, https://huggingface.co/papers/1805.04807.
        probe_every: Updates between two looks for catastrophic overfitting, see `check_overfitting`; default 50 where the
            attack has fewer than 3 steps or saves passes, else 0, which is never.
        on_overfitting: "stop" ends the run when the training attack no longer finds what a stronger one finds; "record"
            only warns.
    """

    fast: bool = field(default=False, metadata={"help": "The recommended fast setting, in one word."})
    attack_token_share: float = field(
        default=1.0, metadata={"help": "Share of the patch tokens that an attack step sees."}
    )
    attack_resolution: int | None = field(
        default=None, metadata={"help": "Pixels a side that an attack step sees; default: the tower's own."}
    )
    carry_starts_mb: int = field(
        default=0, metadata={"help": "MiB for perturbations that the next epoch starts from; 0: fresh starts."}
    )
    attack_free_step: bool = field(
        default=False, metadata={"help": "Take a step with the learner's gradient, for the next epoch."}
    )
    attack_cheap_until: float = field(
        default=0.0, metadata={"help": "Share of the updates with a cheap attack, before the full one."}
    )
    probe_every: int | None = field(
        default=None, metadata={"help": "Look for catastrophic overfitting every so many updates; 0: never."}
    )
    on_overfitting: str = field(default="stop", metadata={"help": "stop or record, at catastrophic overfitting."})

    def apply_fast(self: Any) -> None:
        """Set what `fast` stands for."""
        if self.fast:
            for name, value in FAST.items():
                setattr(self, name, value)

    def check_savings(self: Any) -> None:
        """Refuse what makes no sense together, and set the default of `probe_every`."""
        if not 0 < self.attack_token_share <= 1:
            raise ValueError(f"attack_token_share must be above 0 and at most 1, got {self.attack_token_share:g}.")
        if self.attack_resolution is not None and self.attack_token_share < 1:
            raise ValueError(
                "attack_resolution and attack_token_share are two ways to see less of an image; leave one out (--fast sets "
                "the latter)."
            )
        if self.attack_cheap_until > 1:
            raise ValueError(f"attack_cheap_until is a share, at most 1, got {self.attack_cheap_until:g}.")
        if self.carry_starts_mb and self.attack_norm.lower() != "linf":
            raise ValueError(f"carry_starts_mb is for attack_norm linf, got {self.attack_norm!r}; type 0.")
        if self.attack_free_step and not self.carry_starts_mb:
            raise ValueError(
                "attack_free_step moves where the next epoch starts; type --carry_starts_mb 1024 to remember it."
            )
        if self.attack_steps == 0 and not self.attack_free_step:
            raise ValueError("attack_steps must be at least 1, got 0; 0 is for --attack_free_step true.")
        if self.probe_every is None:
            sees_less = self.attack_token_share < 1 or self.attack_resolution is not None
            saves = sees_less or bool(self.carry_starts_mb) or self.attack_cheap_until > 0
            self.probe_every = 50 if self.attack_steps < 3 or saves else 0

    def attack_plan(self: Any, step: int, total: int) -> AttackPlan:
        """The attack of update `step` of `total`."""
        if step < self.attack_cheap_until * total:
            steps, size, cheap = int(not self.attack_free_step), None, True
        else:
            steps, size, cheap = self.attack_steps, self.attack_step_size, self.attack_cheap_until == 0
        share = self.attack_token_share if cheap else 1.0
        return AttackPlan(steps, size, share, cheap and self.attack_resolution is not None)
