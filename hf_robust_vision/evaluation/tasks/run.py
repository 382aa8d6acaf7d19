"""What all evaluations of a vision-language model share: batches, attacks in order, worst case, records, results."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_robust_vision import __version__
from hf_robust_vision.attacks import Attack, Ball, Objective, StartNoise, Success, make_ball
from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, versions
from hf_robust_vision.evaluation.samples import Records, SampleStore, measure_all
from hf_robust_vision.pixels import Fitting, check_images
from hf_robust_vision.towers.clip import attack_mode, weights_sha256
from hf_robust_vision.towers.vlm_inputs import VLMInputs, vlm_inputs

from .protocol import OBJECTIVES, VLMProtocol


class Sample(Protocol):
    """An image with a text that goes into the prompt.

    A sample may have a `fingerprint`, a string that changes with the image's content: records on disk are then only
    used again for the same image. Without it the id has to stand for the image.
    """

    id: int
    text: str

    def pixels(self, transform: Fitting) -> Tensor:
        """The image in [0, 1], passed through `transform.fit`, shape (3, height, width)."""


@dataclass(frozen=True)
class Verdict:
    """What a model says about an image.

    Args:
        text: The answer.
        lost: The attacker has nothing more to win.
        score: Of the text in [0, 1], where there is one: less is better for the attacker.
    """

    text: str
    lost: bool
    score: float | None = None


class Goal(Protocol):
    """What an attacker wants of one batch."""

    def label(self, row: int) -> str:
        """What is written beside a sample."""

    def aim(self, attack: Attack, rows: Tensor) -> tuple[Objective, Success | None]:
        """What the attack raises on some rows, and when it may stop."""

    def judge(self, rows: Tensor, images: Tensor) -> list[Verdict]:
        """What the model says about `images`, which belong to these rows."""


@dataclass
class Evaluation:
    """One evaluation; the fields are the arguments of `evaluate_vqa`."""

    vlm: nn.Module
    processor: Any
    samples: Sequence[Any]
    how: VLMProtocol
    prompt: str
    model_name: str
    dataset: str
    split: str
    group: str = "all"
    samples_dir: str | Path | None = None
    blank: bool = False
    progress: bool = True
    save_images: Collection[int] = ()

    def run(
        self,
        make_goal: Callable[[VLMInputs, Sequence[Any], Tensor], Goal],
        *,
        kind: str,
        attacks: Sequence[Attack],
        identity: dict[str, Any],
        summary: Callable[[Sequence[SampleRecord]], dict[str, Any]],
        target: str | None = None,
        **fields: Any,
    ) -> list[RobustnessResult]:
        """Measure all samples, one result per eps; `fields` go into the results as they are.

        Raises:
            ValueError: If images have no folder to go to.
        """
        if self.save_images and self.samples_dir is None:
            raise ValueError("save_images needs a samples_dir to save them in.")
        start, how = time.time(), replace(self.how, eps=tuple(sorted(self.how.eps)))
        inputs, sha256 = vlm_inputs(self.vlm, self.processor), weights_sha256(self.vlm)
        identity = self._identity(inputs, how) | {"weights": sha256, "kind": kind, "target": target} | identity
        label = f"{Path(self.model_name).name}-{kind}-{self.group}-{how.norm}"
        store = SampleStore(self.samples_dir, label, how.eps, identity)
        ids = [sample.id for sample in self.samples]
        saved = AdversarialImages(Path(self.samples_dir or "") / store.images)
        store.forget({sample for sample in self.save_images if sample not in saved})

        def measure(indices: list[int]) -> Records:
            rows = [self.samples[index] for index in indices]
            records: Records = {}
            for part, images in same_size([sample.pixels(inputs) for sample in rows]):
                shown = check_images(torch.full_like(images, 0.5) if self.blank else images).to(inputs.device)
                goal = make_goal(inputs, [rows[row] for row in part], shown)
                found: dict[int, dict[float, Tensor]] = {}
                records |= worst_case(goal, how, attacks, shown, [rows[row].id for row in part], found)
                for sample, image in zip([rows[row].id for row in part], shown):
                    if sample in self.save_images:  # before the record, which says that the sample is done
                        saved.write(sample, image, found.get(sample, {}))
            return {sample.id: records[sample.id] for sample in rows}

        with attack_mode(self.vlm):
            bar = f"{self.model_name}: {self.group} {kind}"
            records = measure_all(store, ids, measure, batch_size=how.batch_size, label=bar, progress=self.progress)
        dtype = str(inputs.dtype).removeprefix("torch.")
        about: dict[str, Any] = {"target": target, "resolution": inputs.resolution, "seed": how.seed, "dtype": dtype}
        return [
            RobustnessResult(
                model=self.model_name,
                model_sha256=sha256,
                dataset=self.dataset,
                split=self.split,
                group=self.group,
                protocol=how.name,
                eps=eps,
                norm=how.norm,
                attacks=[attack.describe(make_ball(how.norm, eps), **about) for attack in attacks],
                samples=store.names[place] if self.samples_dir is not None else None,
                images=store.images if self.samples_dir is not None and saved.ids() else None,
                seconds=time.time() - start,
                versions=versions(),
                **fields,
                **summary([records[sample][place] for sample in ids]),
            )
            for place, eps in enumerate(how.eps)
        ]

    def _identity(self, inputs: VLMInputs, how: VLMProtocol) -> dict[str, Any]:
        identity = asdict(how) | inputs.identity() | {"data": self.dataset, "split": self.split, "blank": self.blank}
        del identity["batch_size"]
        samples = [(sample.id, sample.text, getattr(sample, "fingerprint", "")) for sample in self.samples]
        return identity | {
            "prompt": self.prompt,
            "samples": samples,
            "dtype": str(inputs.dtype),
            "version": __version__,
            "starts": "by objective",
        }


def worst_case(
    goal: Goal,
    how: VLMProtocol,
    attacks: Sequence[Attack],
    images: Tensor,
    ids: Sequence[int],
    found: dict[int, dict[float, Tensor]] | None = None,
) -> Records:
    """Attack a batch at rising radii with one attack after the other, each on the samples that are not lost yet.

    Args:
        goal: What the attacker wants.
        how: Radii in rising order.
        attacks: Run in order.
        images: Clean images in [0, 1] of one size.
        ids: Of the samples.
        found: Filled with the image that each record is about, by sample and radius, where a radius brought one.

    Returns:
        For each sample one record per radius.
    """
    verdicts = goal.judge(torch.arange(len(images), device=images.device), images)
    latest = [
        SampleRecord(
            sample,
            goal.label(row),
            verdict.text,
            score=verdict.score,
            clean_score=verdict.score,
            fooled_by="clean" if verdict.lost else None,
        )
        for row, (sample, verdict) in enumerate(zip(ids, verdicts))
    ]
    alive = torch.tensor(
        [row for row, verdict in enumerate(verdicts) if not verdict.lost], device=images.device
    ).long()
    records: Records = {sample: [] for sample in ids}
    for eps in how.eps:
        ball = make_ball(how.norm, eps)
        for attack in attacks:
            if len(alive) == 0 or eps == 0:
                break
            noise = start_noise(how.seed, attack, [ids[row] for row in alive.tolist()])
            verdicts, attacked = strike(goal, attack, alive, images[alive], ball, noise)
            for row, verdict, image in zip(alive.tolist(), verdicts, attacked):
                worse = _worse(latest[row], verdict, attack.name)
                if found is not None and worse is not latest[row]:
                    found.setdefault(ids[row], {})[eps] = image
                latest[row] = worse
            alive = alive[torch.tensor([not verdict.lost for verdict in verdicts], device=alive.device)]
        for sample, record in zip(ids, latest):
            records[sample].append(record)
    return records


def strike(
    goal: Goal, attack: Attack, rows: Tensor, images: Tensor, ball: Ball, noise: StartNoise
) -> tuple[list[Verdict], Tensor]:
    """What the model says about some rows' images after one attack on them, and the attacked images."""
    objective, fooled = goal.aim(attack, rows)
    attacked = attack.run(objective, images, ball, noise, fooled)
    return goal.judge(rows, attacked), attacked


def start_noise(seed: int, attack: Attack, ids: Sequence[int | str]) -> StartNoise:
    """Starts of one attack: each objective begins at points of its own, whatever runs before it."""
    plain = attack.objective == OBJECTIVES[0]
    return StartNoise(seed, [sample if plain else f"{sample} {attack.objective}" for sample in ids])


def _worse(record: SampleRecord, verdict: Verdict, attack: str) -> SampleRecord:
    """The record after one more attack. A scored one keeps the worst text, and who brought it about."""
    if verdict.score is None:
        return replace(record, adversarial=verdict.text, fooled_by=attack if verdict.lost else None)
    if record.score is not None and verdict.score >= record.score:
        return record
    return replace(record, adversarial=verdict.text, score=verdict.score, fooled_by=attack)


def same_size(images: Sequence[Tensor]) -> list[tuple[list[int], Tensor]]:
    """Places and stacked images of each size among images of shape (3, height, width)."""
    groups: dict[torch.Size, list[int]] = {}
    for place, image in enumerate(images):
        groups.setdefault(image.shape, []).append(place)
    return [(places, torch.stack([images[place] for place in places])) for places in groups.values()]
