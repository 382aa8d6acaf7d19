"""Question answering under an attack that wants any other answer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_robust_vision.attacks import Attack, Objective, Success
from hf_robust_vision.evaluation.images import Remeasured, measure_again, need_task
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, summarize
from hf_robust_vision.pixels import check_images
from hf_robust_vision.towers.clip import attack_mode, weights_sha256
from hf_robust_vision.towers.vlm_inputs import VLMInputs, vlm_inputs

from .answers import AnswerLoss, WrongAnswer, answer_task, say
from .protocol import VLMProtocol
from .run import Evaluation, Sample, Verdict


EXTRA_TOKENS = 4  # generated beyond the true answer, so that one that goes on is not cut to a right one
_PUNCTUATION = " .,;:!?\"'()[]"  # no minus: "-5" is not "5"


class Question(Sample, Protocol):
    """A question about an image, with the answer that counts as right."""

    answer: str


class AnotherAnswer:
    """The goal: `generate` gives another answer than the true one.

    The attack raises the loss of what the model says about the clean image where that is right, and stops where
    greedy decoding leaves it and `generate` confirms that the answer is another.
    """

    def __init__(self, inputs: VLMInputs, prompt: str, questions: Sequence[Question], images: Tensor):
        self.inputs, self.questions, self.images = inputs, questions, images
        prompts = [prompt.replace("{}", question.text) for question in questions]
        height, width = images.shape[-2:]
        self.prompts = inputs.encode(prompts, (height, width))
        true = [question.answer for question in questions]
        self.max_new_tokens = answer_task(inputs, prompts, true, (height, width)).answers.shape[1] + EXTRA_TOKENS
        self.clean = self.judged(range(len(questions)), images)
        # "Yes." for "yes" is right, but other tokens: only the loss of what is said can be raised from there.
        said = [answer if verdict.lost else verdict.text for answer, verdict in zip(true, self.clean)]
        self.task = answer_task(inputs, prompts, said, (height, width))

    def label(self, row: int) -> str:
        """The true answer."""
        return self.questions[row].answer

    def aim(self, attack: Attack, rows: Tensor) -> tuple[Objective, Success | None]:
        """Raise the loss of the right answer until it is not given."""
        part = self.task.take(rows)
        return AnswerLoss(part, attack.objective), SaysOtherwise(self, WrongAnswer(part), rows)

    def judge(self, rows: Tensor, images: Tensor) -> list[Verdict]:
        """What `generate` says, and whether it is wrong."""
        return self.clean if images is self.images else self.judged(rows.tolist(), images)

    def judged(self, rows: Sequence[int], images: Tensor) -> list[Verdict]:
        """Verdicts on some questions' images."""
        texts = say(self.inputs, [self.prompts[row] for row in rows], images, self.max_new_tokens)
        return [Verdict(text, plain(text) != plain(self.questions[row].answer)) for row, text in zip(rows, texts)]


@dataclass(frozen=True)
class SaysOtherwise:
    """Success: greedy decoding leaves the tokens of the right answer, and what `generate` says then is wrong.

    Args:
        goal: Judges what is said.
        left: The cheap half, on the forward pass that the loss has made already.
        rows: Of the goal's questions.
    """

    goal: AnotherAnswer
    left: WrongAnswer
    rows: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Boolean flags, shape (batch,)."""
        flags = self.left(images)
        if places := flags.nonzero().flatten().tolist():
            verdicts = self.goal.judged(self.rows[places].tolist(), images[places].detach())
            flags[places] = torch.tensor([verdict.lost for verdict in verdicts], device=flags.device)
        return flags

    def take(self, rows: Tensor) -> SaysOtherwise:
        """The criterion for some of the images."""
        return replace(self, left=self.left.take(rows), rows=self.rows[rows])


def plain(text: str) -> str:
    """A text without capitals, without punctuation at its ends, and with single spaces."""
    words = " ".join(text.casefold().split())
    return words.strip(_PUNCTUATION) or words


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
    save_images: Collection[int] = (),
) -> list[RobustnessResult]:
    """Share of questions answered rightly on clean and on attacked images, one result per eps.

    An answer is right if the whole of what `generate` says, greedily, is the true answer, up to capitals, spaces and
    punctuation at the ends; it may say four tokens more than the longest true answer of the batch.

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
        save_images: Ids of questions whose images are kept in `samples_dir`, clean and adversarial, for
            `remeasure_vqa`. One that was measured without them is measured again.

    Raises:
        TypeError: If `processor` is no processor of images and text.
        ValueError: If it treats images in a way that the evaluator does not follow, the prompt has no image token, or
            images have no folder to go to.
    """
    about = (prompt, model_name, dataset, split, group, samples_dir, blank, progress, save_images)
    run = Evaluation(vlm, processor, questions, how, *about)
    return run.run(
        lambda inputs, rows, images: AnotherAnswer(inputs, prompt, rows, images),
        kind="vqa",
        attacks=how.attacks(),
        identity={"answers": [question.answer for question in questions], "right": "generate", "extra": EXTRA_TOKENS},
        summary=summarize,
        task="vqa",
        metric="answer accuracy",
        generation={"prompt": prompt, "decoding": "greedy", "extra_tokens": EXTRA_TOKENS, "blank_image": blank},
    )


def remeasure_vqa(
    vlm: nn.Module, processor: Any, questions: Sequence[Question], result: RobustnessResult, folder: str | Path
) -> Remeasured:
    """Ask the saved images of a result of `evaluate_vqa` again, without any attack, and compare with its records.

    Args:
        vlm: The model that was measured, in the dtype that it was measured in.
        processor: As there.
        questions: As there.
        result: With saved images.
        folder: Where the `robustness.json` of the result lies.

    Raises:
        ValueError: If the model or the task is another, or no images were saved.
    """
    need_task(result, "vqa")
    inputs, asked = vlm_inputs(vlm, processor), {question.id: question for question in questions}
    prompt = str((result.generation or {})["prompt"])

    def hits(records: Sequence[SampleRecord], images: Tensor) -> list[bool]:
        shown = check_images(images).to(inputs.device)
        goal = AnotherAnswer(inputs, prompt, [asked[int(record.id)] for record in records], shown)
        return [not verdict.lost for verdict in goal.clean]

    with torch.no_grad(), attack_mode(vlm):
        return measure_again(result, folder, weights_sha256(vlm), hits)
