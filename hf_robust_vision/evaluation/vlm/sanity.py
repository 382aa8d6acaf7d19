"""Sanity checks of what a vision-language model answers under attack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_robust_vision.attacks import Attack, Ball, Objective, StartNoise, Success
from hf_robust_vision.encoders import attack_mode
from hf_robust_vision.evaluation.bench import Bench, Trial, right_on_grey
from hf_robust_vision.evaluation.checks import run_checks
from hf_robust_vision.evaluation.rivals import OtherLoss
from hf_robust_vision.pixels import check_images

from .inputs import VLMInputs, vlm_inputs
from .protocol import OBJECTIVES, VLMProtocol
from .run import same_size, start_noise, strike
from .vqa import AnotherAnswer, Question, plain


NLL, MARGIN = (Attack(kind, objective=kind) for kind in OBJECTIVES)


@dataclass(frozen=True)
class AnsweredImages(Trial):
    """Images about which a model answers a question rightly.

    Args:
        goal: What an attacker wants of a batch.
        rows: Which of the batch.
        how: Which attacks it meets.
    """

    goal: AnotherAnswer
    rows: Tensor
    how: VLMProtocol

    @property
    def loss(self) -> Objective:
        """Negative log-likelihood of the right answer."""
        return self.goal.aim(NLL, self.rows)[0]

    @property
    def margin(self) -> Objective:
        """Best other token minus the right one, at the weakest token."""
        return self.goal.aim(MARGIN, self.rows)[0]

    @property
    def fooled(self) -> Success:
        """Another answer is generated."""
        _, fooled = self.goal.aim(NLL, self.rows)
        assert fooled is not None
        return fooled

    def scores(self, images: Tensor) -> Tensor:
        """Logits at each token of the right answer, in the precision of the model."""
        return self.goal.task.take(self.rows).logits(images).to(self.goal.inputs.dtype)

    def attack(self, ball: Ball, steps: int) -> Tensor:
        """All objectives, each on what stands."""
        return self.attack_with(replace(self.how, steps=steps), ball)

    def attack_with(self, how: VLMProtocol, ball: Ball) -> Tensor:
        """Which samples fall to a protocol."""
        lost = torch.zeros(len(self.images), dtype=torch.bool, device=self.images.device)
        for attack in how.attacks():
            left = (~lost).nonzero().flatten()
            if len(left):
                noise = start_noise(how.seed, attack, [self.noise.ids[row] for row in left.tolist()])
                verdicts = strike(self.goal, attack, self.rows[left], self.images[left], ball, noise)
                lost[left] = torch.tensor([verdict.lost for verdict in verdicts], device=lost.device)
        return lost

    def lost(self, images: Tensor) -> Tensor:
        """By what `generate` says."""
        verdicts = self.goal.judged(self.rows.tolist(), images)
        return torch.tensor([verdict.lost for verdict in verdicts], device=images.device)

    def take(self, rows: Tensor) -> AnsweredImages:
        """See `Trial.take`."""
        return replace(self, images=self.images[rows], noise=self.noise.take(rows), rows=self.rows[rows])


def check_vqa_sanity(
    vlm: nn.Module,
    processor: Any,
    questions: Sequence[Question],
    how: VLMProtocol,
    *,
    prompt: str,
    surrogate: nn.Module | None = None,
    surrogate_processor: Any = None,
    samples: int = 40,
    queries: int = 200,
) -> dict[str, Any]:
    """Look for signs that a result of `evaluate_vqa` flatters its model, as `check_sanity` does for a classification.

    The checks look at the first `samples` questions, in a seeded order, that the model answers rightly. The dearest of
    them attack with the steps of `how` at each of its radii and at every doubling up to half the pixel range, and at
    the largest radius with up to twice the steps. For an image that never falls these are about (5 + radii) * steps *
    restarts * objectives passes forward and back, and 10 * radii + `queries` passes forward; one that falls leaves at
    once. Of fewer than 20 samples a single one is more than the tolerance of 5 points.

    Args:
        vlm: The model that was measured, with its defence inside.
        processor: Its processor, or a `VLMInputs` of the model.
        questions: What it was asked.
        how: How it was measured.
        prompt: With which it was asked.
        surrogate: Another model for images of the same size, such as the undefended one, from which attacks are
            carried over; without it that check is not run.
        surrogate_processor: Its processor; by default the same.
        samples: Questions to look at.
        queries: Looks at the model of the black-box attack per image.

    Returns:
        As `check_sanity`. At half the pixel range at most what is answered rightly on a grey image, or by giving the
        commonest answer to all questions, may stand.

    Raises:
        TypeError: As in `evaluate_vqa`.
        ValueError: As in `evaluate_vqa`; or if there is no step or radius above 0, no question is answered rightly, or
            the surrogate sees images of another size.
    """
    if how.steps == 0 or max(how.eps) == 0:
        raise ValueError(f"nothing to check: {how.steps} steps at eps {list(how.eps)} follow no gradient.")
    inputs = vlm_inputs(vlm, processor)
    other = vlm_inputs(surrogate, surrogate_processor or processor) if surrogate is not None else None
    with attack_mode(vlm), attack_mode(surrogate) if surrogate is not None else nullcontext():
        trials = _pick(inputs, questions, how, prompt, samples)
        asked = [trial.goal.questions[row] for trial in trials for row in trial.rows.tolist()]
        if other is not None:
            _check_size(inputs, other, asked[0])
        commonest = max(Counter(plain(question.answer) for question in asked).values()) / len(asked)
        bench = Bench(
            trials,
            how.norm,
            how.eps,
            steps=how.steps,
            chance=max(right_on_grey(trials), commonest),
            chance_is="what is right on a grey image, or the share of the commonest answer,",
            stronger="raise steps and restarts, attack both objectives",
        )

        def carried(trial: AnsweredImages) -> Objective:
            assert other is not None
            part = [trial.goal.questions[row] for row in trial.rows.tolist()]
            goal = AnotherAnswer(other, prompt, part, trial.images)
            return goal.aim(NLL, torch.arange(len(part), device=other.device))[0]

        return run_checks(
            bench,
            other=OtherLoss(
                "APGD on the margin of the answer's weakest token, which no scale of the logits changes, must find next "
                "to nothing that the attacks missed. Where it does, they follow the wrong loss, or steps of the wrong "
                'size: take both objectives, and algorithm="apgd".',
                lambda trial, ball, steps: trial.attack_with(
                    replace(how, steps=steps, restarts=1, objectives=("margin",), algorithm="apgd"), ball
                ),
            ),
            queries=queries,
            surrogate=carried if other is not None else None,
            metric="answer accuracy",
            protocol=how.name,
            seed=how.seed,
        )


def _pick(
    inputs: VLMInputs, questions: Sequence[Question], how: VLMProtocol, prompt: str, samples: int
) -> list[AnsweredImages]:
    """The first rightly answered questions in a seeded order, in batches of one image size."""
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(how.seed)).tolist()
    trials: list[AnsweredImages] = []
    wanted = samples
    for start in range(0, len(order), how.batch_size):
        batch = [questions[index] for index in order[start : start + how.batch_size]]
        for part, raw in same_size([question.pixels(inputs) for question in batch]):
            images = check_images(raw).to(inputs.device)
            goal = AnotherAnswer(inputs, prompt, [batch[place] for place in part], images)
            right = [row for row, verdict in enumerate(goal.clean) if not verdict.lost][:wanted]
            if right:
                rows = torch.tensor(right, device=inputs.device)
                noise = StartNoise(how.seed, [batch[part[row]].id for row in right])
                trials.append(AnsweredImages(images[rows], noise, goal, rows, how))
                wanted -= len(right)
        if wanted == 0:
            break
    if not trials:
        raise ValueError(f"the model answers none of {len(questions)} questions rightly: there is nothing to attack.")
    return trials


def _check_size(inputs: VLMInputs, other: VLMInputs, question: Question) -> None:
    ours, theirs = (tuple(question.pixels(one).shape[1:]) for one in (inputs, other))
    if ours != theirs:
        raise ValueError(
            f"the surrogate sees images of {theirs[0]} x {theirs[1]} pixels, the model of {ours[0]} x {ours[1]}: images "
            "can only be carried over between models for images of the same size."
        )
