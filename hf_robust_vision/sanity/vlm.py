"""Sanity checks of what a vision-language model says under attack: its answers, and chosen texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_robust_vision.attacks import Attack, Ball, Objective, StartNoise, Success
from hf_robust_vision.evaluation.tasks.protocol import OBJECTIVES, VLMProtocol
from hf_robust_vision.evaluation.tasks.run import Sample, same_size, start_noise, strike
from hf_robust_vision.evaluation.tasks.targeted import ChosenText
from hf_robust_vision.evaluation.tasks.vqa import AnotherAnswer, Question, plain
from hf_robust_vision.pixels import check_images
from hf_robust_vision.towers.clip import attack_mode
from hf_robust_vision.towers.vlm_inputs import VLMInputs, vlm_inputs

from .bench import Bench, Trial, right_on_grey
from .checks import run_checks
from .rivals import OtherLoss


NLL, MARGIN = (Attack(kind, objective=kind) for kind in OBJECTIVES)
MakeGoal = Callable[[VLMInputs, Sequence[Any], Tensor], AnotherAnswer | ChosenText]


@dataclass(frozen=True)
class ShownImages(Trial):
    """Images about which a model says what it should.

    Args:
        goal: What an attacker wants of a batch.
        batch: Its samples.
        rows: Which of them.
        how: Which attacks they meet.
    """

    goal: AnotherAnswer | ChosenText
    batch: Sequence[Any]
    rows: Tensor
    how: VLMProtocol

    @property
    def samples(self) -> list[Any]:
        """Those of the batch that are on trial."""
        return [self.batch[row] for row in self.rows.tolist()]

    @property
    def loss(self) -> Objective:
        """Negative log-likelihood of the text."""
        return self.goal.aim(NLL, self.rows)[0]

    @property
    def margin(self) -> Objective:
        """Best other token minus the text's, at its weakest token."""
        return self.goal.aim(MARGIN, self.rows)[0]

    @property
    def fooled(self) -> Success:
        """Where an attack stops."""
        _, fooled = self.goal.aim(NLL, self.rows)
        assert fooled is not None
        return fooled

    def scores(self, images: Tensor) -> Tensor:
        """Logits at each token of the text, in the precision of the model."""
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
                verdicts, _ = strike(self.goal, attack, self.rows[left], self.images[left], ball, noise)
                lost[left] = torch.tensor([verdict.lost for verdict in verdicts], device=lost.device)
        return lost

    def lost(self, images: Tensor) -> Tensor:
        """By what `generate` says."""
        return torch.tensor([verdict.lost for verdict in self.goal.judge(self.rows, images)], device=images.device)

    def take(self, rows: Tensor) -> ShownImages:
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

    def commonest(asked: Sequence[Question]) -> float:
        return max(Counter(plain(question.answer) for question in asked).values()) / len(asked)

    return _check(
        lambda inputs, rows, images: AnotherAnswer(inputs, prompt, rows, images),
        vlm_inputs(vlm, processor),
        vlm_inputs(surrogate, surrogate_processor or processor) if surrogate is not None else None,
        questions,
        how,
        samples,
        queries,
        commonest,
        metric="answer accuracy",
    )


def check_targeted_sanity(
    vlm: nn.Module,
    processor: Any,
    shown: Sequence[Sample],
    target: str,
    how: VLMProtocol,
    *,
    prompt: str,
    max_new_tokens: int = 64,
    surrogate: nn.Module | None = None,
    surrogate_processor: Any = None,
    samples: int = 40,
    queries: int = 200,
) -> dict[str, Any]:
    """The same for a result of `evaluate_targeted`: the samples are those on which the target is not said anyway.

    No image has to make a model say a target, so robust accuracy has no level that it must fall to at a large radius,
    and that check is not run. A target that the model can not be made to say at all fails "stronger than noise":
    nothing tells an attack that does not work from a model that resists.

    Args:
        vlm: As in `check_vqa_sanity`.
        processor: As in `check_vqa_sanity`.
        shown: What `evaluate_targeted` was given as samples.
        target: What the attacker wants to hear.
        how: How it was measured.
        prompt: With which it was asked.
        max_new_tokens: Of the generated text.
        surrogate: As in `check_vqa_sanity`.
        surrogate_processor: As in `check_vqa_sanity`.
        samples: How many to look at.
        queries: As in `check_vqa_sanity`.

    Raises:
        TypeError: As in `evaluate_vqa`.
        ValueError: As in `evaluate_targeted` and `check_vqa_sanity`.
    """
    return _check(
        lambda inputs, rows, images: ChosenText(inputs, prompt, rows, images, target.strip(), max_new_tokens),
        vlm_inputs(vlm, processor),
        vlm_inputs(surrogate, surrogate_processor or processor) if surrogate is not None else None,
        shown,
        how,
        samples,
        queries,
        None,
        metric="targeted_success",
    )


def _check(
    make_goal: MakeGoal,
    inputs: VLMInputs,
    other: VLMInputs | None,
    samples: Sequence[Any],
    how: VLMProtocol,
    count: int,
    queries: int,
    luck: Callable[[Sequence[Any]], float] | None,
    *,
    metric: str,
) -> dict[str, Any]:
    if how.steps == 0 or max(how.eps) == 0:
        raise ValueError(f"nothing to check: {how.steps} steps at eps {list(how.eps)} follow no gradient.")
    if other is not None and samples:
        _check_size(inputs, other, samples[0])

    def carried(trial: ShownImages) -> Objective:
        assert other is not None
        goal = make_goal(other, trial.samples, trial.images)
        return goal.aim(NLL, torch.arange(len(trial.images), device=other.device))[0]

    def adaptive(trial: ShownImages, ball: Ball, steps: int) -> Tensor:
        margin = replace(how, steps=steps, restarts=1, objectives=("margin",), algorithm="apgd")
        return trial.attack_with(margin, ball)

    with attack_mode(inputs.vlm), attack_mode(other.vlm) if other is not None else nullcontext():
        trials = _pick(make_goal, inputs, samples, how, count)
        asked = [sample for trial in trials for sample in trial.samples]
        bench = Bench(
            trials,
            how.norm,
            how.eps,
            steps=how.steps,
            chance=max(right_on_grey(trials), luck(asked)) if luck is not None else None,
            chance_is="what is right on a grey image, or the share of the commonest answer,",
            stronger="raise steps and restarts, attack both objectives",
        )
        return run_checks(
            bench,
            other=OtherLoss(
                "APGD on the margin of the text's weakest token, which no scale of the logits changes, must find next to "
                "nothing that the attacks missed. Where it does, they follow the wrong loss, or take steps of the wrong "
                'size: take both objectives, and algorithm="apgd".',
                adaptive,
            ),
            queries=queries,
            surrogate=carried if other is not None else None,
            metric=metric,
            protocol=how.name,
            seed=how.seed,
        )


def _pick(
    make_goal: MakeGoal, inputs: VLMInputs, samples: Sequence[Any], how: VLMProtocol, wanted: int
) -> list[ShownImages]:
    """The first samples, in a seeded order, that are not lost before any attack, in batches of one image size."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(how.seed)).tolist()
    trials: list[ShownImages] = []
    for start in range(0, len(order), how.batch_size):
        chunk = [samples[index] for index in order[start : start + how.batch_size]]
        for part, raw in same_size([sample.pixels(inputs) for sample in chunk]):
            images, batch = check_images(raw).to(inputs.device), [chunk[place] for place in part]
            goal = make_goal(inputs, batch, images)
            verdicts = goal.judge(torch.arange(len(batch), device=inputs.device), images)
            right = [row for row, verdict in enumerate(verdicts) if not verdict.lost][:wanted]
            if right:
                rows = torch.tensor(right, device=inputs.device)
                noise = StartNoise(how.seed, [batch[row].id for row in right])
                trials.append(ShownImages(images[rows], noise, goal, batch, rows, how))
                wanted -= len(right)
        if wanted == 0:
            break
    if not trials:
        raise ValueError(f"all of {len(samples)} samples are lost before any attack: there is nothing to attack.")
    return trials


def _check_size(inputs: VLMInputs, other: VLMInputs, sample: Sample) -> None:
    ours, theirs = (tuple(sample.pixels(one).shape[1:]) for one in (inputs, other))
    if ours != theirs:
        raise ValueError(
            f"the surrogate sees images of {theirs[0]} x {theirs[1]} pixels, the model of {ours[0]} x {ours[1]}: images "
            "can only be carried over between models for images of the same size."
        )
