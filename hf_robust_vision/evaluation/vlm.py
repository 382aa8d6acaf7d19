"""Question answering of a vision-language model under a white-box attack through the whole model.

It works on stock transformers models whose processor gives one image of fixed size per prompt (the LLaVA 1.5 family).
The attack differentiates through normalisation, tower, projector and language model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from hf_robust_vision.attacks import Attack, Ball, Logits, StartNoise, make_ball, pgd
from hf_robust_vision.encoders import attack_mode, weights_sha256
from hf_robust_vision.pixels import PixelTransform, check_images

from .results import RobustnessResult, SampleRecord, summarize, versions
from .samples import Records, SampleStore, measure_all


class Question(Protocol):
    """A question about an image, with the answer that counts as right."""

    id: int
    text: str
    answer: str

    def pixels(self, transform: PixelTransform) -> Tensor:
        """The image in [0, 1] as the tower takes it, shape (3, height, width)."""


@dataclass(frozen=True)
class VLMProtocol:
    """How the robustness of answers is measured.

    Args:
        eps: Radii, measured in rising order; a sample that fell stays fallen.
        norm: "linf" or "l2".
        steps: PGD steps per restart.
        restarts: Random starts for each objective.
        objectives: "nll" (loss of the true answer) and "margin" (best wrong token minus the true one), run in order
            on the answers that still stand.
        batch_size: Questions attacked at once.
        seed: Of the random starts.
    """

    eps: tuple[float, ...]
    norm: str = "linf"
    steps: int = 50
    restarts: int = 2
    objectives: tuple[str, ...] = ("nll", "margin")
    batch_size: int = 32
    seed: int = 0

    def attacks(self) -> list[Attack]:
        """The attacks in order."""
        return [Attack(f"pgd-{self.steps}-{name}", "pgd", name, self.steps, self.restarts) for name in self.objectives]


class AnswerTask:
    """One batch of questions as a function of their images.

    A loss and a success criterion on the same task share one forward pass per image, also after `take`.

    Args:
        vlm: The model.
        transform: How its processor normalises.
        input_ids: Prompt and answer, padded on the left, shape (batch, length).
        attention_mask: Same shape.
        answers: Token ids of the answers where they stand in `input_ids`, -100 elsewhere.
    """

    def __init__(
        self, vlm: Any, transform: PixelTransform, input_ids: Tensor, attention_mask: Tensor, answers: Tensor
    ):
        self.vlm, self.transform = vlm, transform
        self.input_ids, self.attention_mask, self.answers = input_ids, attention_mask, answers
        self.logits = Logits(self._forward)
        self._taken: tuple[Tensor, AnswerTask] | None = None

    def _forward(self, images: Tensor) -> Tensor:
        """Logits that predict each place of `answers` but the first, shape (batch, length - 1, vocabulary)."""
        pixel_values = self.transform.normalize(images).to(self.vlm.dtype)
        output = self.vlm(input_ids=self.input_ids, attention_mask=self.attention_mask, pixel_values=pixel_values)
        logits: Tensor = output.logits[:, :-1].float()
        return logits

    def take(self, rows: Tensor) -> AnswerTask:
        """The task of some of the questions; the same object for the same `rows`."""
        if self._taken is None or self._taken[0] is not rows:
            parts = (self.input_ids[rows], self.attention_mask[rows], self.answers[rows])
            self._taken = rows, AnswerTask(self.vlm, self.transform, *parts)
        return self._taken[1]


@dataclass(frozen=True)
class AnswerLoss:
    """Negative log-likelihood of the true answer, or the margin of its weakest token, one per question."""

    task: AnswerTask
    kind: str = "nll"

    def __call__(self, images: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        logits, answers = self.task.logits(images), self.task.answers[:, 1:]
        asked = answers != -100
        if self.kind == "nll":
            return F.cross_entropy(logits.transpose(1, 2), answers, reduction="none").sum(1)
        true = logits.gather(2, answers.clamp_min(0)[..., None]).squeeze(2)
        wrong = logits.scatter(2, answers.clamp_min(0)[..., None], -torch.inf).amax(2)
        return (wrong - true).masked_fill(~asked, -torch.inf).amax(1)

    def take(self, rows: Tensor) -> AnswerLoss:
        """The loss of some of the questions."""
        return replace(self, task=self.task.take(rows))


@dataclass(frozen=True)
class WrongAnswer:
    """Success: greedy decoding gives another answer, that is, some answer token is not the likeliest."""

    task: AnswerTask

    def __call__(self, images: Tensor) -> Tensor:
        """Boolean flags, shape (batch,)."""
        with torch.no_grad():
            guesses, answers = self.task.logits(images).argmax(2), self.task.answers[:, 1:]
        return ((guesses != answers) & (answers != -100)).any(1)

    def take(self, rows: Tensor) -> WrongAnswer:
        """The criterion for some of the questions."""
        return replace(self, task=self.task.take(rows))


def answer_task(
    vlm: nn.Module, processor: Any, questions: Sequence[Question], prompt: str, device: torch.device
) -> AnswerTask:
    """Tokenize prompts with their answers, as the model's own processor would.

    Args:
        vlm: A stock vision-language model.
        processor: Its processor.
        questions: Asked together.
        prompt: With "{}" for the question and the processor's image token.
        device: For the tensors.

    Raises:
        ValueError: If the processor does not give one image of fixed size per prompt.
    """
    transform = PixelTransform.from_image_processor(processor.image_processor)
    blank = Image.new("RGB", (transform.crop or (64, 64))[::-1])
    tokenizer = processor.tokenizer
    sequences, answers = [], []
    for question in questions:
        encoded = processor(images=blank, text=prompt.format(question.text), return_tensors="pt")
        if encoded["pixel_values"].ndim != 4 or len(encoded["pixel_values"]) != 1:
            raise ValueError(
                f"{type(processor).__name__} gives pixel_values of shape {tuple(encoded['pixel_values'].shape)}; wanted "
                "(1, 3, height, width). Tiled processors (LLaVA-NeXT) are not supported by this evaluator."
            )
        answer = tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        sequences.append(encoded["input_ids"][0].tolist() + answer)
        answers.append(answer)
    length = max(map(len, sequences))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = [[pad] * (length - len(ids)) + ids for ids in sequences]
    masks = [[0] * (length - len(ids)) + [1] * len(ids) for ids in sequences]
    wanted = [[-100] * (length - len(answer)) + answer for answer in answers]
    tensors = (torch.tensor(values, device=device) for values in (rows, masks, wanted))
    return AnswerTask(vlm, transform, *tensors)


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

    Resumable and shared out over processes like `evaluate_zero_shot`; the model is left as it was.

    Args:
        vlm: A stock vision-language model in float32, or in the dtype that it is deployed in.
        processor: Its processor.
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
    """
    start = time.time()
    how = replace(how, eps=tuple(sorted(how.eps)))
    device = next(vlm.parameters()).device
    sha256 = weights_sha256(vlm)
    ids = [question.id for question in questions]
    identity = asdict(how) | {"weights": sha256, "data": dataset, "split": split, "prompt": prompt, "blank": blank}
    del identity["batch_size"]
    store = SampleStore(samples_dir, f"{Path(model_name).name}-vqa-{group}-{how.norm}", how.eps, identity)

    def measure(indices: list[int]) -> Records:
        rows = [questions[index] for index in indices]
        task = answer_task(vlm, processor, rows, prompt, device)
        images = torch.stack([question.pixels(task.transform) for question in rows])
        images = torch.full_like(images, 0.5) if blank else images
        return _measure(task, processor.tokenizer, rows, check_images(images).to(device), how)

    with attack_mode(vlm):
        label = f"{model_name}: {group} questions"
        records = measure_all(store, ids, measure, batch_size=how.batch_size, label=label, progress=progress)
    results = []
    for place, eps in enumerate(how.eps):
        ball = make_ball(how.norm, eps)
        row = RobustnessResult(
            task="vqa",
            model=model_name,
            model_sha256=sha256,
            dataset=dataset,
            split=split,
            group=group,
            metric="answer accuracy",
            protocol=f"vlm-pgd-{how.steps}",
            eps=eps,
            norm=how.norm,
            attacks=[_describe(attack, ball, how) for attack in how.attacks()],
            generation={"prompt": prompt, "decoding": "greedy", "blank_image": blank},
            samples=store.names[place] if samples_dir is not None else None,
            seconds=time.time() - start,
            versions=versions(),
            **summarize([records[sample][place] for sample in ids]),
        )
        results.append(row)
    return results


@dataclass(frozen=True)
class AnswerExample:
    """One attacked question, for a picture.

    Args:
        image: In [0, 1], shape (3, height, width).
        adversarial: The same, attacked.
        clean_answer: What the model says about `image`.
        adversarial_answer: What it says about `adversarial`.
        eps: Linf radius of the attack.
    """

    image: Tensor
    adversarial: Tensor
    clean_answer: str
    adversarial_answer: str
    eps: float


def attack_example(
    vlm: nn.Module, processor: Any, question: Question, prompt: str, eps: float, steps: int = 50
) -> AnswerExample:
    """Attack one question by PGD on the loss of its true answer.

    Args:
        vlm: The model; left as it was.
        processor: Its processor.
        question: What is asked.
        prompt: With "{}" for the question and the processor's image token.
        eps: Linf radius in pixels of [0, 1].
        steps: Of the attack.
    """
    device = next(vlm.parameters()).device
    with attack_mode(vlm):
        task = answer_task(vlm, processor, [question], prompt, device)
        image = question.pixels(task.transform)[None].to(device)
        noise = StartNoise(0, [question.id])
        found = pgd(
            AnswerLoss(task), image, make_ball("linf", eps), steps=steps, noise=noise, fooled=WrongAnswer(task)
        )
        clean, attacked = (_answers(task, processor.tokenizer, images)[0] for images in (image, found))
    return AnswerExample(image[0].cpu(), found[0].cpu(), clean, attacked, eps)


def _measure(
    task: AnswerTask, tokenizer: Any, questions: Sequence[Question], images: Tensor, how: VLMProtocol
) -> Records:
    wrong = WrongAnswer(task)(images)
    said = _answers(task, tokenizer, images)
    latest = [
        SampleRecord(question.id, question.answer, answer, fooled_by="clean" if miss else None)
        for question, answer, miss in zip(questions, said, wrong.tolist())
    ]
    alive = (~wrong).nonzero().flatten()
    records: Records = {question.id: [] for question in questions}
    for eps in how.eps:
        ball = make_ball(how.norm, eps)
        for attack in how.attacks():
            if len(alive) == 0 or eps == 0:
                break
            part = task.take(alive)
            noise = StartNoise(how.seed, [questions[row].id for row in alive.tolist()])
            found = pgd(
                AnswerLoss(part, attack.objective),
                images[alive],
                ball,
                steps=attack.steps,
                noise=noise,
                restarts=attack.restarts,
                fooled=WrongAnswer(part),
            )
            hits, said = WrongAnswer(part)(found), _answers(part, tokenizer, found)
            for row, answer, hit in zip(alive.tolist(), said, hits.tolist()):
                latest[row] = replace(latest[row], adversarial=answer, fooled_by=attack.name if hit else None)
            alive = alive[~hits]
        for record in latest:
            records[int(record.id)].append(record)
    return records


def _answers(task: AnswerTask, tokenizer: Any, images: Tensor) -> list[str]:
    """What greedy decoding says in the places of the answer, given the true answer so far."""
    with torch.no_grad():
        guesses = task.logits(images).argmax(2)
    places = task.answers[:, 1:] != -100
    return [tokenizer.decode(row[place].tolist()).strip() for row, place in zip(guesses, places)]


def _describe(attack: Attack, ball: Ball, how: VLMProtocol) -> dict[str, Any]:
    size = min(2.5 / max(attack.steps, 1), 1.25) * ball.eps
    return {
        "name": attack.name,
        "objective": attack.objective,
        "target": None,
        "steps": attack.steps,
        "step_size": size,
        "restarts": attack.restarts,
        "seed": how.seed,
    }
