"""An attacker who wants a vision-language model to say a chosen text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from hf_robust_vision.attacks import Attack, Objective, Success
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, summarize
from hf_robust_vision.evaluation.task import Batch, Stage, Verdict
from hf_robust_vision.towers.vlm_inputs import VLMInputs

from .answers import AnswerLoss, RightAnswer, continuation
from .vlm import Sample, VLMProtocol, VLMSettings, VLMTask, split_settings


@dataclass
class ChosenText(VLMTask):
    """Does the generated text hold the target, in capitals or not?

    The attack stops where greedy decoding begins with the target; what counts is what `generate` says.

    Args:
        target: What the attacker wants to hear.
        max_new_tokens: Of the generated text.
        asked: What the model is asked to do, "vqa" or "caption".

    Raises:
        ValueError: As `VLMTask`; or if the tokenizer can not write the target, or not in `max_new_tokens`.
    """

    target: str = ""
    max_new_tokens: int = 64
    asked: str = "vqa"
    kind = "targeted"
    metric = "targeted_success"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.task, self.target = self.asked, self.target.strip()
        prompts = self.prompts(range(len(self.samples)))
        check_target(self.inputs, prompts[0] if prompts else self.written, self.target, self.max_new_tokens)

    def label(self, place: int) -> str:
        """The target."""
        return self.target

    def judge(self, batch: Batch, images: Tensor) -> list[Verdict]:
        """What `generate` says, and whether the target is in it."""
        said = self.say(batch, images, self.max_new_tokens)
        lost = [self.target.casefold() in text.casefold() for text in said]
        return [Verdict(text, won, float(won) if batch.clean else -torch.inf) for text, won in zip(said, lost)]

    def texts(self, batch: Batch) -> list[str]:
        """The target, for all."""
        return [self.target] * len(batch.places)

    def aim(self, stage: Stage, batch: Batch) -> tuple[Objective, Success]:
        """Lower the loss of the target until greedy decoding begins with it."""
        part = self.answers(batch, self.texts(batch))
        return AnswerLoss(part, stage.attack.objective, wanted=True), RightAnswer(part)

    def identity(self) -> dict[str, Any]:
        """See `Task.identity`."""
        return super().identity() | {"target": self.target, "max_new_tokens": self.max_new_tokens}

    def target_text(self, attack: Attack) -> str:
        """The target."""
        return self.target

    def decoding(self) -> dict[str, Any]:
        """See `VLMTask.decoding`."""
        return super().decoding() | {"max_new_tokens": self.max_new_tokens}

    def summaries(self, records: Sequence[SampleRecord]) -> dict[str, dict[str, Any]]:
        """The shares of images that resist, and the attacker's own rates."""
        count = max(len(records), 1)
        said = {"clean": sum(not record.clean_hit for record in records) / count}
        said["attacked"] = sum(not record.robust_hit for record in records) / count
        return {self.metric: {"attack_success": said, **summarize(records)}}


class TargetedSettings(VLMSettings, total=False):
    """As `VLMSettings`, and what the model is asked to do.

    Keys:
        task: "vqa" (the default) or "caption".
        max_new_tokens: Of the generated text, 64 unless told otherwise.
    """

    task: str
    max_new_tokens: int


def evaluate_targeted(
    vlm: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    target: str,
    how: VLMProtocol,
    **settings: Unpack[TargetedSettings],
) -> list[RobustnessResult]:
    """How often an attacker makes the model say a chosen text, one result per eps.

    `attack_success` of a result holds the attacker's rate on clean images (the control) and on attacked ones; the
    accuracies are the shares of images that resist. Of the samples the texts go into the prompt; questions will do. All
    else is as for `evaluate_vqa`; see `ChosenText`.

    Reference:
        Schlarmann et al. 2024, https://huggingface.co/papers/2402.12336, section 4.2.
    """
    about, run = split_settings(settings)
    chosen = {"target": target, "asked": about.pop("task", "vqa")}
    return evaluate(ChosenText(vlm, processor, samples, **about, **chosen), how.robustness(), **run)


def check_target(inputs: VLMInputs, prompt: str, target: str, max_new_tokens: int) -> None:
    """Refuse a target that the model could never say.

    Raises:
        ValueError: If it is empty, not writable with the tokenizer, or longer than what is generated.
    """
    if not target:
        raise ValueError("the target is empty, and so is in every text: name what the attacker wants to hear.")
    ids = continuation(inputs, prompt, target)
    written = inputs.tokenizer.decode(ids, skip_special_tokens=True).strip()
    if target.casefold() not in written.casefold():
        raise ValueError(f"the tokenizer writes the target {target!r} as {written!r}: choose one of its words.")
    if len(ids) > max_new_tokens:
        raise ValueError(f"the target {target!r} has {len(ids)} tokens, max_new_tokens is {max_new_tokens}.")
