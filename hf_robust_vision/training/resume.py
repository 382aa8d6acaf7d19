"""Checkpoints that a run goes on from: when one is written, and what has to be the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from .adapter_checkpoints import AdapterTrainer
from .checkpoints import complete_checkpoint, mark_complete, need_settings, rotate, unmark
from .config import AdversarialTrainingArguments


class ResumableTrainer(AdapterTrainer):
    """The part of `Trainer` that writes checkpoints and goes on from them."""

    method: ClassVar[str]
    args: AdversarialTrainingArguments
    _seen: int
    _seen_at: float

    def check_health(self) -> None:
        """Raise where the model of this moment is not worth saving; every process must ask."""
        raise NotImplementedError

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; `resume_from_checkpoint=True` goes on from the last checkpoint that was written to its end.

        Raises:
            ValueError: If there is no complete checkpoint to go on from, it was trained with other settings of method,
                attack, loss or optimiser, or the run ends without an update or with weights that are not finite.
        """
        if resume_from_checkpoint:
            place = self.args.output_dir if resume_from_checkpoint is True else str(resume_from_checkpoint)
            found = complete_checkpoint(place)
            if found is None:
                raise ValueError(f"{place} holds no complete checkpoint; start without resume_from_checkpoint.")
            self.check_adapter(found)
            need_settings(found, self._settings())
            resume_from_checkpoint = found
            if (state := TrainerState.load_from_json(str(Path(found) / "trainer_state.json"))) and self._is_over(
                state
            ):
                return self._take_up(found, state)
        self._seen, self._seen_at = 0, time.time()  # not since the construction: a measurement may lie between
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.state.global_step == 0:
            raise ValueError("no update was made, so there is nothing to save.")
        self.check_health()
        return output

    def _settings(self) -> dict[str, Any]:
        return {"method": self.method} | self.args.method_settings()

    def _is_over(self, state: TrainerState) -> bool:
        wanted = self.args.max_steps if self.args.max_steps > 0 else state.max_steps
        return state.global_step >= wanted > 0

    def _take_up(self, checkpoint: str, state: TrainerState) -> TrainOutput:
        """Load a run that had ended: `Trainer` would take one more step before it looks at `max_steps`."""
        self._load_from_checkpoint(checkpoint)
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, float("nan"), {})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_health()  # before anything is written: what is complete is taken for good
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            unmark(folder)  # an earlier run may have left it, and this one may be killed half-way
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:  # an old checkpoint may only go once the new one is complete
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark_complete(folder, self._settings())
            rotate(run_dir, limit, best=self.state.best_model_checkpoint)
