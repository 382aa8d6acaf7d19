"""An attacker who wants a vision-language model to say a chosen text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack, override

from hf_robust_vision.attacks import Attack, Objective, Success
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord
from hf_robust_vision.evaluation.task import Batch, Stage, Verdict

from .answers import AnswerLoss, RightAnswer, continuation
from .vlm import Sample, VLMProtocol, VLMSettings, VLMTask, evaluate_vlm


@dataclass
class ChosenText(VLMTask):
    """Does the generated text hold the target, in capitals or not?

    The attack stops where greedy decoding begins with the target; what counts is what `generate` says. `asked` is what
    the model is asked to do, "vqa" or "caption".

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
        # What is generated is stripped: a target with spaces around it would not be found at its ends.
        self.task, self.target = self.asked, self.target.strip()
        if not self.target:
            raise ValueError("the target is empty, and so is in every text: name what the attacker wants to hear.")
        prompts = self.prompts(range(len(self.samples[:1])))
        ids = continuation(self.inputs, prompts[0] if prompts else self.written, self.target)
        written = self.inputs.tokenizer.decode(ids, skip_special_tokens=True).strip()
        if self.target.casefold() not in written.casefold():
            raise ValueError(
                f"the tokenizer writes the target {self.target!r} as {written!r}: choose one of its words."
            )
        if (limit := self.max_new_tokens) < len(ids):
            raise ValueError(f"the target {self.target!r} has {len(ids)} tokens, max_new_tokens is {limit}.")

    @override
    def label(self, place: int) -> str:
        return self.target

    @override
    def judge(self, batch: Batch, images: Tensor) -> list[Verdict]:
        said = self.say(batch, images, self.max_new_tokens)
        lost = [self.target.casefold() in text.casefold() for text in said]
        return [Verdict(text, won, float(won)) for text, won in zip(said, lost)]

    @override
    def texts(self, batch: Batch) -> list[str]:
        return [self.target] * len(batch.places)

    def aim(self, stage: Stage, batch: Batch) -> tuple[Objective, Success]:
        """Lower the loss of the target until greedy decoding begins with it."""
        part = self.answers(batch, self.texts(batch))
        return AnswerLoss(part, stage.attack.objective, wanted=True), RightAnswer(part)

    @override
    def identity(self) -> dict[str, Any]:
        return super().identity() | {"target": self.target, "max_new_tokens": self.max_new_tokens}

    @override
    def target_text(self, attack: Attack) -> str:
        return self.target

    @override
    def decoding(self) -> dict[str, Any]:
        return super().decoding() | {"max_new_tokens": self.max_new_tokens}

    def summary(self, metric: str, records: Sequence[SampleRecord]) -> dict[str, Any]:
        """The shares of images that resist, and the attacker's own rates."""
        said = {"clean": sum(not record.clean_hit for record in records) / len(records)}
        said["attacked"] = sum(not record.robust_hit for record in records) / len(records)
        return super().summary(metric, records) | {"attack_success": said}


class TargetedSettings(VLMSettings, total=False):
    """As `VLMSettings`, and what the model is asked to do."""

    task: str  # "vqa" (the default) or "caption"
    max_new_tokens: int  # 64 unless told otherwise


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
    own: dict[str, Any] = {**settings, "target": target}
    own["asked"] = own.pop("task", "vqa")
    return evaluate_vlm(ChosenText, (vlm, processor, samples), how, own)
