"""A batch of prompts with a text after each, as a function of their images: its loss, and whether it is said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from hf_robust_vision.attacks import Logits
from hf_robust_vision.attacks.objectives import PerSample
from hf_robust_vision.towers.vlm_inputs import Row, VLMInputs


@dataclass(eq=False)
class AnswerTask:
    """One batch of prompts and answers as a function of their images.

    A loss and a success criterion on the same task share one forward pass per image, also after `take`.
    """

    inputs: VLMInputs
    text: Mapping[str, Tensor]  # tokens of prompt and answer, padded on the left, shape (batch, length) each
    answers: Tensor  # token ids of the answers, padded on the left with -100, shape (batch, longest answer)

    def __post_init__(self) -> None:
        self.logits = Logits(self._forward)
        self._taken: tuple[Tensor, AnswerTask] | None = None

    def _forward(self, images: Tensor) -> Tensor:
        """Logits that predict each place of `answers`, shape (*answers.shape, vocabulary)."""
        # The logits of the prompt decide nothing, and its vocabulary-wide rows are most of the memory.
        keep = self.answers.shape[1] + 1
        logits = self.inputs.logits(images, self.text, keep)[:, :-1].float()
        if images.requires_grad and torch.is_grad_enabled() and not logits.requires_grad:
            raise RuntimeError(
                f"no gradient reaches the images: {type(self.inputs.vlm).__name__} encodes them under torch.no_grad(). "
                "An OpenFlamingo model is evaluated through FlamingoInputs; for another, lift the no_grad first."
            )
        return logits

    def take(self, rows: Tensor) -> AnswerTask:
        """The task of some of the prompts; the same object for the same `rows`."""
        if self._taken is None or self._taken[0] is not rows:
            text = {name: values[rows] for name, values in self.text.items()}
            self._taken = rows, AnswerTask(self.inputs, text, self.answers[rows])
        return self._taken[1]


@dataclass(frozen=True)
class AnswerLoss(PerSample):
    """Negative log-likelihood of the answer ("nll"), or the margin of its weakest token ("margin"), one per image.

    The margin is above 0 exactly where greedy decoding gives another answer. With `wanted` the attacker wants the
    answer said: the loss with its sign turned.
    """

    task: AnswerTask
    kind: str = "nll"
    wanted: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        """Loss per image, shape (batch,)."""
        loss = self._nll(images) if self.kind == "nll" else self._margin(images)
        return -loss if self.wanted else loss

    def _nll(self, images: Tensor) -> Tensor:
        logits = self.task.logits(images)
        return F.cross_entropy(logits.transpose(1, 2), self.task.answers, reduction="none").sum(1)

    def _margin(self, images: Tensor) -> Tensor:
        logits, answers = self.task.logits(images), self.task.answers
        places = answers.clamp_min(0)[..., None]
        true, other = logits.gather(2, places).squeeze(2), logits.scatter(2, places, -torch.inf).amax(2)
        return (other - true).masked_fill(answers == -100, -torch.inf).amax(1)


@dataclass(frozen=True)
class WrongAnswer(PerSample):
    """Success: greedy decoding gives another answer, that is, some answer token is not the likeliest."""

    task: AnswerTask

    def __call__(self, images: Tensor) -> Tensor:
        """Boolean flags, shape (batch,)."""
        with torch.no_grad():
            guesses, answers = self.task.logits(images).argmax(2), self.task.answers
        return ((guesses != answers) & (answers != -100)).any(1)


@dataclass(frozen=True)
class RightAnswer(WrongAnswer):
    """Success of an attacker who wants the answer: greedy decoding begins with it."""

    @override
    def __call__(self, images: Tensor) -> Tensor:
        return ~super().__call__(images)


def answer_task(
    inputs: VLMInputs, prompts: Sequence[str], answers: Sequence[str], size: tuple[int, int]
) -> AnswerTask:
    """Tokenize prompts, as of `VLMInputs.written`, with their answers, for images of a size (height, width)."""
    before = inputs.encode(prompts, size)
    after = [continuation(inputs, prompt, answer) for prompt, answer in zip(prompts, answers)]
    text = inputs.padded([inputs.answered(row, ids) for row, ids in zip(before, after)])
    width = max(map(len, after))
    wanted = [[-100] * (width - len(ids)) + ids for ids in after]
    return AnswerTask(inputs, text, torch.tensor(wanted, device=inputs.device))


def continuation(inputs: VLMInputs, prompt: str, text: str) -> list[int]:
    """Token ids of a text that follows a prompt, a space between them where the prompt ends without one."""
    tokenizer, prompt = inputs.tokenizer, prompt + inputs.closing
    gap = "" if prompt[-1:].isspace() else " "
    before, joint = (
        tokenizer(words, add_special_tokens=False)["input_ids"] for words in (prompt, prompt + gap + text)
    )
    ids: list[int] = joint[len(before) :]
    if joint[: len(before)] != before:  # the last token of the prompt has merged with the text
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"the tokenizer makes no token of {text!r}.")
    return ids


@torch.no_grad()
def say(inputs: VLMInputs, prompts: Sequence[Row], images: Tensor, max_new_tokens: int) -> list[str]:
    """What the model generates, greedily, after tokenized prompts."""
    new = inputs.generate(images, inputs.padded(prompts), max_new_tokens)
    return [text.strip() for text in inputs.tokenizer.batch_decode(new, skip_special_tokens=True)]
