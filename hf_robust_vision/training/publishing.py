"""`--push_to_hub` for a robust model: once, at the end, with its measured numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HubStrategy

from hf_robust_vision.hub.push import PushReport, check_target, push_robust_encoder


def hub_target(args: TrainingArguments) -> str:
    """Where a run is pushed to: `hub_model_id`, or the name of `output_dir`."""
    return args.hub_model_id or Path(args.output_dir).absolute().name


def check_push(args: TrainingArguments) -> None:
    """Refuse a bad id, a missing token and a `hub_strategy` of unfinished weights before any work is done."""
    if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
        raise ValueError(
            f"hub_strategy={args.hub_strategy.value!r} would publish weights that nobody measured; only the end of a run "
            "is pushed: type --hub_strategy end."
        )
    check_target(hub_target(args), args.hub_token)


class PublishWhenMeasured(Trainer):
    """The part of `Trainer` that talks to the Hub, without its drafts.

    `Trainer` creates the repository before the first step and uploads unfinished weights with a card made from training
    logs at every save. Here nothing is sent before `push_to_hub()`, which wants a measured folder.
    """

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check id and token now, and create nothing: a run of hours must not end at a missing token."""
        check_push(self.args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save, and leave pushing to `push_to_hub()`: what was just trained is not measured yet."""
        super().save_model(output_dir, _internal_call=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """A checkpoint is not measured."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leave the card alone: the one with measured numbers is written by `hub.card`, not from training logs."""

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **settings: Any,
    ) -> PushReport | None:
        """Push `output_dir` with `push_robust_encoder`, whose `settings` these are; the other processes return None.

        What is not given is as the run's `hub_...` arguments say. The recipes call it after the last measurement. From
        Python: measure, `save_results`, `write_card`, push.
        """
        if not blocking:
            raise ValueError("push_to_hub(blocking=False) could fail unseen; leave blocking out.")
        if not self.is_world_process_zero():
            return None
        return push_robust_encoder(
            self.args.output_dir,
            hub_target(self.args),
            commit_message=commit_message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            private=self.args.hub_private_repo if private is None else private,
            **settings,
        )
