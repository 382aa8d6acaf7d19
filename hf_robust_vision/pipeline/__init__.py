"""Measure, harden, measure again, write it down: what recipes and the command line both call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.processes import part
from hf_robust_vision.terminal import quiet_when_piped, user_errors
from hf_robust_vision.training.base import AdversarialTrainer

from .arguments import parse
from .harden import run


__all__ = ["main", "parse", "run"]


def main(
    trainer_class: type[AdversarialTrainer], argv: Sequence[str] | None = None, prog: str | None = None
) -> tuple[Path, list[RobustnessResult]]:
    """A recipe from its first word to its last, as `parse` reads it: where the model lies, and the results.

    Bad input ends in one line.
    """
    with user_errors(), quiet_when_piped():
        options, args = parse(trainer_class, argv, prog)
        results = run(trainer_class, options, args)
        part()
    return Path(args.output_dir), results
