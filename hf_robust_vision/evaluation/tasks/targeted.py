"""An attacker who wants a vision-language model to say a chosen text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_robust_vision.attacks import Attack, Objective, Success
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, summarize
from hf_robust_vision.towers.vlm_inputs import VLMInputs

from .answers import AnswerLoss, RightAnswer, answer_task, continuation, say
from .protocol import VLMProtocol
from .run import Evaluation, Sample, Verdict


class ChosenText:
    """The goal: the generated text holds the target, in capitals or not.

    The attack stops where greedy decoding begins with the target; what counts is what `generate` says.
    """

    def __init__(
        self,
        inputs: VLMInputs,
        prompt: str,
        samples: Sequence[Sample],
        images: Tensor,
        target: str,
        max_new_tokens: int,
    ):
        self.inputs, self.target, self.max_new_tokens = inputs, target, max_new_tokens
        prompts = [prompt.replace("{}", sample.text) for sample in samples]
        height, width = images.shape[-2:]
        check_target(inputs.tokenizer, prompts[0], target, max_new_tokens)
        self.prompts = inputs.encode(prompts, (height, width))
        self.task = answer_task(inputs, prompts, [target] * len(samples), (height, width))

    def label(self, row: int) -> str:
        """The target."""
        return self.target

    def aim(self, attack: Attack, rows: Tensor) -> tuple[Objective, Success | None]:
        """Lower the loss of the target until greedy decoding begins with it."""
        part = self.task.take(rows)
        return AnswerLoss(part, attack.objective, wanted=True), RightAnswer(part)

    def judge(self, rows: Tensor, images: Tensor) -> list[Verdict]:
        """What `generate` says, and whether the target is in it."""
        texts = say(self.inputs, [self.prompts[row] for row in rows.tolist()], images, self.max_new_tokens)
        return [Verdict(text, self.target.casefold() in text.casefold()) for text in texts]


def evaluate_targeted(
    vlm: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    target: str,
    how: VLMProtocol,
    *,
    prompt: str,
    model_name: str,
    dataset: str,
    split: str,
    group: str = "all",
    task: str = "vqa",
    max_new_tokens: int = 64,
    samples_dir: str | Path | None = None,
    progress: bool = True,
) -> list[RobustnessResult]:
    """How often an attacker makes the model say a chosen text, one result per eps.

    The attack lowers the loss of the target's tokens. A sample is lost if what `generate` says, greedily, holds the
    target as a substring, in capitals or not. `attack_success` of a result holds the attacker's rate on clean images
    (the control) and on attacked ones; the accuracies are the shares of images that resist.

    Args:
        vlm: As in `evaluate_vqa`.
        processor: As in `evaluate_vqa`.
        samples: Images with the texts that go into the prompt; questions will do.
        target: What the attacker wants to hear.
        how: Attacks and radii; "margin" raises the target's weakest token over the best other one.
        prompt: With "{}" for a sample's text, if it is to have one, and the image token.
        model_name: "before", "after" or a path.
        dataset: Name of the data.
        split: Of the data.
        group: Which samples these are.
        task: What the model is asked to do, "vqa" or "caption".
        max_new_tokens: Of the generated text.
        samples_dir: Folder for `samples-*.jsonl`.
        progress: Show a bar.

    Raises:
        TypeError: As in `evaluate_vqa`.
        ValueError: As in `evaluate_vqa`; or if the tokenizer can not write the target, or not in `max_new_tokens`.

    Reference:
        Schlarmann et al. 2024, https://huggingface.co/papers/2402.12336, section 4.2.
    """
    target = target.strip()
    run = Evaluation(
        vlm,
        processor,
        samples,
        how,
        prompt,
        model_name,
        dataset,
        split,
        group,
        samples_dir=samples_dir,
        progress=progress,
    )
    return run.run(
        lambda inputs, rows, images: ChosenText(inputs, prompt, rows, images, target, max_new_tokens),
        kind="targeted",
        attacks=how.attacks(),
        identity={"max_new_tokens": max_new_tokens},
        summary=_rates,
        target=target,
        task=task,
        metric="targeted_success",
        generation={"prompt": prompt, "decoding": "greedy", "max_new_tokens": max_new_tokens},
    )


def check_target(tokenizer: Any, prompt: str, target: str, max_new_tokens: int) -> None:
    """Refuse a target that the model could never say.

    Raises:
        ValueError: If it is empty, not writable with the tokenizer, or longer than what is generated.
    """
    if not target:
        raise ValueError("the target is empty, and so is in every text: name what the attacker wants to hear.")
    ids = continuation(tokenizer, prompt, target)
    written = tokenizer.decode(ids, skip_special_tokens=True).strip()
    if target.casefold() not in written.casefold():
        raise ValueError(f"the tokenizer writes the target {target!r} as {written!r}: choose one of its words.")
    if len(ids) > max_new_tokens:
        raise ValueError(f"the target {target!r} has {len(ids)} tokens, max_new_tokens is {max_new_tokens}.")


def _rates(records: Sequence[SampleRecord]) -> dict[str, Any]:
    count = max(len(records), 1)
    said = {"clean": sum(not record.clean_hit for record in records) / count}
    said["attacked"] = sum(not record.robust_hit for record in records) / count
    return {"attack_success": said, **summarize(records)}
