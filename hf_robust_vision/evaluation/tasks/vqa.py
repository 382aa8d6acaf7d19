"""Question answering under an attack that wants any other answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import Unpack, override

from hf_robust_vision.attacks import Objective, Success
from hf_robust_vision.attacks.objectives import PerSample
from hf_robust_vision.evaluation.images import Remeasured, measure_again
from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.evaluation.single import attack_sample
from hf_robust_vision.evaluation.task import Batch, Stage, Verdict

from .answers import AnswerLoss, WrongAnswer, continuation
from .vlm import Sample, VLMProtocol, VLMSettings, VLMTask, evaluate_vlm


EXTRA_TOKENS = 4  # generated beyond the true answer, so that one that goes on is not cut to a right one
_PUNCTUATION = " .,;:!?\"'()[]"  # no minus: "-5" is not "5"


class Question(Sample, Protocol):
    """A question about an image, with the answer that counts as right."""

    answer: str


@dataclass
class VQA(VLMTask):
    """Does `generate` still give the true answer?

    An answer is right if the whole of what `generate` says, greedily, is the true answer, up to capitals, spaces and
    punctuation at the ends; it may say four tokens more than the longest true answer.

    The attack raises the loss of what the model says about the clean image where that is right, and stops where
    greedy decoding leaves it and `generate` confirms that the answer is another.
    """

    kind = task = "vqa"
    metric = "answer accuracy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bare := [sample.id for sample in self.samples if not plain(sample.answer)]:
            raise ValueError(f"questions {bare[:5]} have no answer to be right or wrong about.")
        prompts = self.prompts(range(len(self.samples)))
        pairs = {(prompt, sample.answer) for prompt, sample in zip(prompts, self.samples)}
        lengths = [len(continuation(self.inputs, *pair)) for pair in sorted(pairs)]
        self.max_new_tokens = max(lengths, default=0) + EXTRA_TOKENS

    @override
    def label(self, place: int) -> str:
        return str(self.samples[place].answer)

    @override
    def judge(self, batch: Batch, images: Tensor) -> list[Verdict]:
        texts = self.say(batch, images, self.max_new_tokens)
        lost = [plain(text) != plain(self.label(place)) for place, text in zip(batch.places, texts)]
        if not batch.clean:
            self._need_finite(batch, texts, lost)
        return [Verdict(text, wrong, float(wrong)) for text, wrong in zip(texts, lost)]

    def _need_finite(self, batch: Batch, texts: Sequence[str], lost: Sequence[bool]) -> None:
        """Refuse a model whose right answers come out of logits that are not numbers."""
        # An answer that is wrong anyway counts as lost, whatever its logits: no number can flatter there.
        rows = torch.tensor([row for row, wrong in enumerate(lost) if not wrong], dtype=torch.long)
        if len(rows) == 0:
            return
        part = replace(batch, clean=()).take(rows.to(batch.images.device))
        logits = self.answers(part, [texts[row] for row in rows.tolist()]).logits(part.images)
        if not bool(logits.isfinite().all()):
            raise ValueError("the model gives logits that are not finite: load it in float32, or check its weights.")

    def texts(self, batch: Batch) -> list[str]:
        """What is said about the clean image where it is right, else the true answer.

        "Yes." for "yes" is right, but other tokens: only the loss of what is said can be raised from there.
        """
        said = zip(batch.places, batch.clean)
        return [self.label(place) if verdict.lost else str(verdict.answer) for place, verdict in said]

    def aim(self, stage: Stage, batch: Batch) -> tuple[Objective, Success]:
        """Raise the loss of the right answer until it is not given."""
        part = self.answers(batch, self.texts(batch))
        return AnswerLoss(part, stage.attack.objective), SaysOtherwise(self, WrongAnswer(part), batch)

    @override
    def identity(self) -> dict[str, Any]:
        answers = [sample.answer for sample in self.samples]
        return super().identity() | {"answers": answers, "right": "generate", "tokens": self.max_new_tokens}

    @override
    def decoding(self) -> dict[str, Any]:
        return super().decoding() | {"extra_tokens": EXTRA_TOKENS, "blank_image": self.blank}

    def luck(self, places: Sequence[int]) -> tuple[float, str]:
        """What giving the commonest answer gets right; what is right on a grey image is added by the checks."""
        commonest = max(Counter(plain(self.label(place)) for place in places).values()) / len(places)
        return commonest, "what is right on a grey image, or the share of the commonest answer,"


@dataclass(frozen=True)
class SaysOtherwise(PerSample):
    """Success: greedy decoding leaves the tokens of the right answer, and what `generate` says then is wrong."""

    task: VQA
    left: WrongAnswer
    batch: Batch

    def __call__(self, images: Tensor) -> Tensor:
        """Boolean flags, shape (batch,)."""
        flags = self.left(images)  # the cheap half first, on the forward pass that the loss has made already
        places = flags.nonzero().flatten()
        if len(places):
            verdicts = self.task.judge(self.batch.take(places), images[places].detach())
            flags[places] = torch.tensor([verdict.lost for verdict in verdicts], device=flags.device)
        return flags


def plain(text: str) -> str:
    """A text without capitals, without punctuation at its ends, and with single spaces."""
    words = " ".join(text.casefold().split())
    return words.strip(_PUNCTUATION) or words


def evaluate_vqa(
    vlm: nn.Module, processor: Any, questions: Sequence[Question], how: VLMProtocol, **settings: Unpack[VLMSettings]
) -> list[RobustnessResult]:
    """Share of questions answered rightly on clean and on attacked images, one result per eps; see `VQA`.

    The attack differentiates through normalisation, tower, projector and language model. See `VLMTask` for what the
    model and its processor may be, `VLMSettings` for the rest.
    """
    return evaluate_vlm(VQA, (vlm, processor, questions), how, settings)


def remeasure_vqa(
    vlm: nn.Module, processor: Any, questions: Sequence[Question], result: RobustnessResult, folder: str | Path
) -> Remeasured:
    """Ask about the saved images of a result of `evaluate_vqa` again; see `measure_again`."""
    prompt = str((result.generation or {}).get("prompt"))
    if result.task != VQA.task or (result.generation or {}).get("target") is not None:
        raise ValueError(f"this measures vqa results again, the given one is of the task {result.task!r}.")
    task = VQA(vlm, processor, questions, prompt, result.dataset, result.split, result.group)
    return measure_again(task, result, folder, batch_size=1)


@dataclass(frozen=True)
class AnswerExample:
    """An image in [0, 1], shape (3, height, width), the same attacked in a Linf ball, and what is said about each."""

    image: Tensor
    adversarial: Tensor
    clean_answer: str
    adversarial_answer: str
    eps: float


def attack_example(vlm: nn.Module, processor: Any, question: Question, prompt: str, how: VLMProtocol) -> AnswerExample:
    """Attack one question at the largest radius, with one attack after the other until its answer falls."""
    task = VQA(vlm, processor, [question], prompt, dataset="", split="")
    clean, found = attack_sample(task, replace(how, eps=(max(how.eps),)).robustness())
    said = str(clean.verdict.answer), str(found.verdict.answer)
    return AnswerExample(clean.image.cpu(), found.image.cpu(), *said, found.eps)
