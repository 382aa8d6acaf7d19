"""Question answering under an attack that wants any other answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_robust_vision.attacks import Attack, Objective, Success
from hf_robust_vision.evaluation.results import RobustnessResult, summarize

from .answers import AnswerLoss, AnswerTask, WrongAnswer, answer_task
from .inputs import VLMInputs
from .protocol import VLMProtocol
from .run import Evaluation, Sample, Verdict


class Question(Sample, Protocol):
    """A question about an image, with the answer that counts as right."""

    answer: str


class AnotherAnswer:
    """The goal: greedy decoding gives another answer than the true one."""

    def __init__(self, inputs: VLMInputs, prompt: str, questions: Sequence[Question], images: Tensor):
        self.questions = questions
        prompts = [prompt.replace("{}", question.text) for question in questions]
        height, width = images.shape[-2:]
        self.task = answer_task(inputs, prompts, [question.answer for question in questions], (height, width))

    def label(self, row: int) -> str:
        """The true answer."""
        return self.questions[row].answer

    def aim(self, attack: Attack, rows: Tensor) -> tuple[Objective, Success | None]:
        """Raise the loss of the true answer until it is not given."""
        part = self.task.take(rows)
        return AnswerLoss(part, attack.objective), WrongAnswer(part)

    def judge(self, rows: Tensor, images: Tensor) -> list[Verdict]:
        """The answer, read where the true one would stand."""
        part = self.task.take(rows)
        wrong = WrongAnswer(part)(images).tolist()
        return [Verdict(text, lost) for text, lost in zip(read_answers(part, images), wrong)]


def read_answers(task: AnswerTask, images: Tensor) -> list[str]:
    """What greedy decoding says in the places of the answer, given the true answer so far."""
    with torch.no_grad():
        guesses = task.logits(images).argmax(2)
    tokenizer = task.inputs.tokenizer
    return [tokenizer.decode(row[place].tolist()).strip() for row, place in zip(guesses, task.answers != -100)]


def evaluate_vqa(
    vlm: nn.Module,
    processor: Any,
    questions: Sequence[Question],
    how: VLMProtocol,
    *,
    prompt: str,
    model_name: str,
    dataset: str,
    split: str,
    group: str = "all",
    samples_dir: str | Path | None = None,
    blank: bool = False,
    progress: bool = True,
) -> list[RobustnessResult]:
    """Share of questions answered rightly on clean and on attacked images, one result per eps.

    The attack differentiates through normalisation, tower, projector and language model. Resumable and shared out over
    processes like `evaluate_zero_shot`; the model is left as it was.

    Args:
        vlm: A stock vision-language model in float32, or in the dtype that it is deployed in.
        processor: Its processor, or a `VLMInputs` of the model.
        questions: With ids that name them.
        how: Attacks and radii.
        prompt: With "{}" for the question and the processor's image token.
        model_name: "before", "after" or a path.
        dataset: Name of the data.
        split: Of the data.
        group: Which questions these are.
        samples_dir: Folder for `samples-*.jsonl`.
        blank: Show a grey image instead (control: what is answerable without looking).
        progress: Show a bar.

    Raises:
        TypeError: If `processor` is no processor of images and text.
        ValueError: If it treats images in a way that the evaluator does not follow, or the prompt has no image token.
    """
    run = Evaluation(
        vlm, processor, questions, how, prompt, model_name, dataset, split, group, samples_dir, blank, progress
    )
    return run.run(
        lambda inputs, rows, images: AnotherAnswer(inputs, prompt, rows, images),
        kind="vqa",
        attacks=how.attacks(),
        identity={"answers": [question.answer for question in questions]},
        summary=summarize,
        task="vqa",
        metric="answer accuracy",
        generation={"prompt": prompt, "decoding": "greedy", "blank_image": blank},
    )
