"""What a person sees of a run in a terminal: Trainer's bar, and robust accuracy as it goes, with a small curve."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from transformers import Trainer
from transformers.trainer_callback import ProgressCallback


BARS = "▁▂▃▄▅▆▇█"
WATCHED = ("loss", "cosine_to_original", "attack_gain")  # of a training log; all of it goes to the trackers


class RobustnessBar(ProgressCallback):
    """`Trainer`'s bar with the numbers to watch beside it, and a line for each evaluation."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.robust: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the numbers to watch beside the bar, which the logs of a step would push away."""
        if self.training_bar is not None and "loss" in (logs or {}):
            watched = {name: f"{logs[name]:.4g}" for name in WATCHED if name in logs}
            self.training_bar.set_postfix(watched)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Write one line: clean and robust accuracy now, and the curve of the robust one so far."""
        super().on_evaluate(args, state, control, **kwargs)
        clean, robust = ((metrics or {}).get(f"eval_{kind}_accuracy") for kind in ("clean", "robust"))
        if self.training_bar is None or clean is None or robust is None:
            return
        self.robust.append(robust)
        told = f"step {state.global_step}: clean {100 * clean:.1f} %, robust {100 * robust:.1f} %"
        self.training_bar.write(f"{told}  {curve(self.robust, sys.stdout.encoding)}")


def put_bar(trainer: Trainer) -> None:
    """Our bar in place of `Trainer`'s; none in a notebook, which has a table, or where bars are off."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(RobustnessBar())


def curve(shares: Sequence[float], encoding: str | None = "utf-8", *, width: int = 40) -> str:
    """Shares in [0, 1] as one bar each, the latest `width` of them; nothing where the terminal has no such letters."""
    bars = "".join(BARS[min(int(share * len(BARS)), len(BARS) - 1)] for share in shares[-width:])
    try:
        bars.encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ""
    return bars
