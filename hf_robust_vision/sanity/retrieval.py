"""Sanity checks of a retrieval result, in either direction."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.attacks import Ball, Objective, StartNoise, Success
from hf_robust_vision.data.captions import CaptionedImages
from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.evaluation.tasks.retrieval import DIRECTIONS, Gallery, RetrievalProtocol, Search
from hf_robust_vision.towers.clip import CLIPEncoder, attack_mode

from .bench import Bench, Trial, right_on_grey
from .checks import not_run, run_checks
from .rivals import OtherLoss


NO_OTHER_LOSS = OtherLoss("The attacks follow what the rank is decided by already: there is no other loss to try.")


@dataclass(frozen=True)
class SearchedImages(Trial):
    """Images that find their captions, or are found by them.

    Args:
        gallery: Embeds images and captions.
        searched: The samples of a batch, and the attacks on them.
        rows: Which of the batch.
        k: Success is to push out of the first `k`.
    """

    gallery: Gallery
    searched: Search
    rows: Tensor
    k: int

    @property
    def loss(self) -> Objective:
        """Of the first attack."""
        objective: Objective = self.searched.stages[0].objective.take(self.rows)
        return objective

    @property
    def margin(self) -> Objective:
        """Of the last attack."""
        objective: Objective = self.searched.stages[-1].objective.take(self.rows)
        return objective

    @property
    def fooled(self) -> Success:
        """What is searched is not among the first k."""
        success: Success = self.searched.stages[-1].fooled.take(self.rows)
        return success

    def scores(self, images: Tensor) -> Tensor:
        """Cosines with all captions."""
        return self.gallery.embed(images) @ self.gallery.captions.T

    def attack(self, ball: Ball, steps: int) -> Tensor:
        """All stages, each on what stands."""
        rows, how = self.rows, replace(self.gallery.how, steps=steps)
        ranks = torch.zeros_like(rows)
        for stage in self.searched.stages:
            standing = (ranks < self.k).nonzero().flatten()
            if len(standing):
                ranks[standing], _ = self.searched.strike(stage, rows[standing], ball, how)
        return ranks >= self.k

    def lost(self, images: Tensor) -> Tensor:
        """By the ranks."""
        with torch.no_grad():
            return self.searched.ranks(images, self.rows) >= self.k

    def take(self, rows: Tensor) -> SearchedImages:
        """See `Trial.take`."""
        return replace(self, images=self.images[rows], noise=self.noise.take(rows), rows=self.rows[rows])


def check_retrieval_sanity(
    encoder: CLIPEncoder,
    tokenizer: Any,
    dataset: CaptionedImages,
    how: RetrievalProtocol,
    *,
    direction: str = "image_to_text",
    k: int | None = None,
    surrogate: CLIPEncoder | None = None,
    surrogate_tokenizer: Any = None,
    samples: int = 100,
    queries: int = 1000,
) -> dict[str, Any]:
    """Look for signs that a retrieval result flatters its model, as `check_sanity` does for a classification.

    The checks look at the first `samples` images (or captions), in a seeded order, that find what they search among
    the first `k`. The clean gallery is embedded once; then about 10 times the steps of the measurement are taken on
    what stands, and `queries` looks.

    Args:
        encoder: The model that was measured; a defence overrides its `encode_images`.
        tokenizer: Of its text tower.
        dataset: What it was measured on.
        how: How it was measured.
        direction: "image_to_text" or "text_to_image".
        k: One of `how.ks`, by default the smallest.
        surrogate: Another model, from which attacks are carried over; without it that check is not run.
        surrogate_tokenizer: Of its text tower; by default the same `tokenizer`.
        samples: Images or captions to look at.
        queries: Looks at the model of the black-box attack per image.

    Returns:
        As `check_sanity`. At half the pixel range at most what a grey image finds, or chance, may stand.

    Raises:
        ValueError: If there is no such direction or k, no step or radius above 0, or nothing is found on clean images.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"unknown direction {direction!r}; choose one of {', '.join(DIRECTIONS)}.")
    if k is not None and k not in how.ks:
        raise ValueError(f"recall at {k} was not measured, only at {list(how.ks)}.")
    if how.steps == 0 or max(how.eps) == 0:
        raise ValueError(f"nothing to check: {how.steps} steps at eps {list(how.eps)} follow no gradient.")
    k = min(how.ks) if k is None else k
    how = replace(how, ks=(k,))
    with attack_mode(encoder), attack_mode(surrogate) if surrogate is not None else nullcontext():
        trials = _pick(Gallery(encoder, tokenizer, dataset, how), direction, k, samples)
        other = Gallery(surrogate, surrogate_tokenizer or tokenizer, dataset, how) if surrogate is not None else None
        bench = Bench(
            trials,
            how.norm,
            how.eps,
            steps=how.steps,
            chance=max(right_on_grey(trials), k / len(dataset)),
            chance_is="what a grey image finds, or chance,",
            stronger="raise steps and restarts",
        )

        def carried(trial: SearchedImages) -> Objective:
            assert other is not None
            samples = [trial.searched.samples[row] for row in trial.rows.tolist()]
            objective: Objective = other.search(direction, samples).stages[0].objective
            return objective

        return run_checks(
            bench,
            other=NO_OTHER_LOSS,
            queries=queries,
            surrogate=carried if other is not None else None,
            metric=f"{direction}_recall@{k}",
            protocol=f"retrieval-apgd-{how.steps}",
            seed=how.seed,
        )


def add_retrieval_sanity(
    results: Sequence[RobustnessResult],
    encoder: CLIPEncoder,
    tokenizer: Any,
    dataset: CaptionedImages,
    how: RetrievalProtocol,
    **settings: Any,
) -> None:
    """Fill `sanity` of one model's results, each direction and k with checks of its own.

    Args:
        results: Of `evaluate_retrieval`. Where nothing can be checked they say why, and stand.
        encoder: The model.
        tokenizer: Of its text tower.
        dataset: What was measured on.
        how: How it was measured.
        settings: Passed on to `check_retrieval_sanity`.
    """
    for metric in dict.fromkeys(result.metric for result in results):
        direction, _, k = metric.partition("_recall@")
        try:
            sanity = check_retrieval_sanity(
                encoder, tokenizer, dataset, how, direction=direction, k=int(k), **settings
            )
        except ValueError as error:
            sanity = not_run(error)
        for result in results:
            if result.metric == metric:
                result.sanity = sanity


def _pick(gallery: Gallery, direction: str, k: int, samples: int) -> list[SearchedImages]:
    """The first samples, in a seeded order, that find what they search."""
    how, everyone = gallery.how, gallery.samples(direction)
    order = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(how.seed)).tolist()
    right: list[int] = []
    for start in range(0, len(order), how.batch_size):
        search = gallery.search(direction, order[start : start + how.batch_size])
        with torch.no_grad():
            ranks = search.ranks(search.images, torch.arange(len(search.samples), device=gallery.device))
        right += [sample for sample, rank in zip(search.samples, ranks.tolist()) if rank < k]
        if len(right) >= samples:
            break
    if not right:
        raise ValueError(f"none of {len(everyone)} samples finds what it searches: there is nothing to attack.")
    trials = []
    for start in range(0, len(right[:samples]), how.batch_size):
        part = right[start : min(start + how.batch_size, samples)]
        search, noise = gallery.search(direction, part), StartNoise(how.seed, part)
        rows = torch.arange(len(part), device=gallery.device)
        trials.append(SearchedImages(search.images, noise, gallery, search, rows, k))
    return trials
