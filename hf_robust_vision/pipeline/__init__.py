"""Measure, harden, measure again, write it down: what recipes and the command line both call."""

from __future__ import annotations

from collections.abc import Sequence

from hf_robust_vision.processes import part
from hf_robust_vision.terminal import quiet_when_piped, user_errors
from hf_robust_vision.training.base import AdversarialTrainer

from .arguments import parse
from .harden import run


__all__ = ["main", "parse", "run"]


def main(trainer_class: type[AdversarialTrainer], argv: Sequence[str] | None = None, prog: str | None = None) -> None:
    """A recipe from its first word to its last, as `parse` reads it; bad input ends in one line."""
    with user_errors(), quiet_when_piped():
        run(trainer_class, *parse(trainer_class, argv, prog))
        part()
