"""Retrieval under attack: do images still find their captions, and captions their image?

Only images are attacked, never text. Each sample is attacked alone, in its own worst case:

- image to text: the image that searches is pushed away from its own captions, among all captions of the dataset;
- text to image: the image that a caption should find is pushed away from that caption; the rest of the gallery is clean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack, override

from hf_robust_vision.attacks import Attack, EmbeddingDistance, Logits, Objective, Protocol, Success, cosine_distance
from hf_robust_vision.attacks.objectives import PerSample
from hf_robust_vision.data.captions import CaptionedImages
from hf_robust_vision.data.fingerprint import fingerprint
from hf_robust_vision.evaluation.engine import Output, evaluate
from hf_robust_vision.evaluation.images import Remeasured, measure_again
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord
from hf_robust_vision.evaluation.task import Batch, Level, RobustnessProtocol, Stage, Task, Verdict, not_under
from hf_robust_vision.towers.base import attack_mode, tensor_sha256
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import image_embedder


DIRECTIONS = {
    "image_to_text": "the image that searches",
    "text_to_image": "the image to be found, the others stay clean",
}


@dataclass(frozen=True)
class RetrievalProtocol:
    """How the robustness of retrieval is measured; see `RobustnessProtocol` for what is not explained here."""

    eps: tuple[float, ...]
    norm: str = "linf"
    steps: int = 100  # of each APGD attack
    restarts: int = 1
    ks: tuple[int, ...] = (1, 5)  # a sample is a hit at k if what it searches is among the first k
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1:
            raise ValueError(f"give at least one k of at least 1, got ks={self.ks}.")
        for direction in DIRECTIONS:
            self.robustness(direction)

    def robustness(self, direction: str) -> RobustnessProtocol:
        """The same as attacks in order: out of the first k for one k after the other, or away from the caption."""
        kinds = [f"{kind}@{k}" for k in sorted(self.ks) for kind in ("nll", "margin")]
        names = kinds if direction == "image_to_text" else ["cosine"]
        attacks = [Attack(f"apgd-{name}", "apgd", name, self.steps, self.restarts) for name in names]
        protocol = Protocol(f"retrieval-apgd-{self.steps}", tuple(attacks))
        return RobustnessProtocol(protocol, self.eps, self.norm, batch_size=self.batch_size, seed=self.seed)


@dataclass
class Retrieval(Task):
    """What do samples of one direction find?

    A record holds the rank of what a sample searches, 0 for the first place; `fooled_by` is about the first place.

    Raises:
        ValueError: If there is no such direction, or the dataset is too small for the largest k to be missed.
    """

    model: DualEncoder
    tokenizer: Any
    images: CaptionedImages
    direction: str
    ks: tuple[int, ...]
    batch_size: int = 64
    group: str = "all"
    task = "retrieval"
    compares_with_clean = True
    counts_survivors = False  # a sample that lost the first place is still attacked at larger k
    captions: Tensor = field(init=False)

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            raise ValueError(f"unknown direction {self.direction!r}; choose one of {', '.join(DIRECTIONS)}.")
        if max(self.ks) >= len(self.images):
            raise ValueError(f"recall at {max(self.ks)} of {len(self.images)} images is always 1; choose smaller ks.")
        self.searches = self.direction == "image_to_text"
        self.kind, self.dataset, self.split = self.direction, self.images.name, self.images.split
        self.ids = range(len(self.images) if self.searches else len(self.images.captions))
        self.loss, self.margin = [
            f"{kind}@{min(self.ks)}" if self.searches else "cosine" for kind in ("nll", "margin")
        ]
        embed, device = image_embedder(self.model), self.weight.device
        self.embed = Logits(lambda shown: F.normalize(embed(self.model.transform.fit(shown)), dim=-1))
        with torch.no_grad(), attack_mode(self.model):
            self.scale = float(self.model.logit_scale.exp())
            texts = [self.model.tokenize(self.tokenizer, part, device) for part in _parts(self.images.captions, 256)]
            self.captions = torch.cat([F.normalize(self.model.encode_prompts(part), dim=-1) for part in texts])
            clean = [
                [self.images.image(at) for at in part] for part in _parts(range(len(self.images)), self.batch_size)
            ]
            self.gallery = torch.cat([self.embed(torch.stack(part).to(device)) for part in clean])
        # Scaled as the model scales: the softmax of "nll" is the one that it was trained with.
        self.owners = torch.tensor(self.images.owners, device=device)
        self.similar = Logits(lambda shown: self.scale * self.embed(shown) @ self.captions.T)

    def load(self, place: int) -> Tensor:
        """The image that searches, or is to be found."""
        return self.images.image(place if self.searches else self.images.owners[place])

    @override
    def label(self, place: int) -> int:
        return 0

    @override
    def judge(self, batch: Batch, images: Tensor) -> list[Verdict]:
        if self.searches:
            own, scores = self._own(batch), self.similar(images)
            best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
            ranks = ((scores > best) & ~own).sum(1)
        else:
            captions = self.captions[list(batch.places)]
            found = (self.embed(images) * captions).sum(1, keepdim=True)
            ranks, scores = (self._others(batch) > found).sum(1), found
        if not bool(scores.isfinite().all()):
            raise ValueError("the model gives similarities that are not finite: no rank can come of them.")
        return [Verdict(rank, rank >= min(self.ks), rank) for rank in ranks.tolist()]

    def stands(self, record: SampleRecord, stage: Stage) -> bool:
        """Is it still among the first k of the attack?"""
        return _rank(record, True) < self._k(stage.attack)

    @override
    def blame(self, stage: Stage, verdict: Verdict, record: SampleRecord) -> str | None:
        return record.fooled_by or (stage.attack.name if verdict.answer else None)

    def first(self, place: int, clean: Verdict) -> SampleRecord:
        """Lost before any attack is what has not the first place."""
        return replace(super().first(place, clean), fooled_by="clean" if clean.answer else None)

    def aim(self, stage: Stage, batch: Batch) -> tuple[Objective, Success]:
        """Out of the first k, or away from the caption."""
        k = self._k(stage.attack)
        if self.searches:
            kind = stage.attack.objective.partition("@")[0]
            margin = CaptionLoss(self.similar, self._own(batch), k)
            return replace(margin, kind=kind), CaptionsLost(margin)
        captions = self.captions[list(batch.places)]
        # The gallery is clean and fixed, so the bar is too: one number a caption, no pass over the gallery.
        bar = self._others(batch).topk(k, dim=1).values[:, -1]
        return EmbeddingDistance(self.embed, captions, cosine_distance), ImageLost(self.embed, captions, bar)

    @override
    def identity(self) -> dict[str, Any]:
        return {
            "captions": self.images.captions,
            "owners": self.images.owners,
            "texts": tensor_sha256(self.captions),
            "rows": fingerprint(self.images.rows),
            "ks": self.ks,
            "pixels": [asdict(self.model.transform), asdict(self.images.transform)],
        }

    @override
    def target_text(self, attack: Attack) -> str:
        return DIRECTIONS[self.direction]

    @override
    def fields(self, level: Level) -> dict[str, Any]:
        return {"logit_scale": self.scale}

    @property
    @override
    def metrics(self) -> list[str]:
        return [f"{self.direction}_recall@{k}" for k in self.ks]

    @classmethod
    @override
    def hits(cls, record: SampleRecord, metric: str) -> tuple[bool, bool]:
        k = metric.partition("_recall@")[2]
        if not k.isdigit():
            return super().hits(record, metric)
        return _rank(record) < int(k), _rank(record, True) < int(k)

    @classmethod
    @override
    def complaint(cls, record: SampleRecord, result: RobustnessResult) -> str:
        return not_under(math.inf, record)

    @override
    def scores(self, batch: Batch, images: Tensor) -> Tensor:
        return self.embed(images) @ self.captions.T

    def luck(self, places: Sequence[int]) -> tuple[float, str]:
        """Chance; what a grey image finds is added by the checks."""
        return min(self.ks) / len(self.images), "what a grey image finds, or chance,"

    def _own(self, batch: Batch) -> Tensor:
        places = torch.tensor(batch.places, device=self.owners.device)
        return self.owners[None] == places[:, None]

    def _others(self, batch: Batch) -> Tensor:
        """Similarity of each caption with the clean images that are not its own."""
        places = list(batch.places)
        return (self.captions[places] @ self.gallery.T).scatter(1, self.owners[places, None], -torch.inf)

    def _k(self, attack: Attack) -> int:
        """The place that an attack pushes out of; one attack away from a caption serves every k."""
        return int(attack.objective.partition("@")[2] or max(self.ks))


def evaluate_retrieval(
    encoder: DualEncoder,
    tokenizer: Any,
    dataset: CaptionedImages,
    how: RetrievalProtocol,
    *,
    save_images: bool = False,
    **settings: Unpack[Output],
) -> list[RobustnessResult]:
    """Recall at k, clean and under attack, of images for captions and of captions for images.

    Deviation: published image-text attacks perturb every image of the gallery at once, without knowing the query. Here
    the caption's own image is attacked for each caption, which is a worst case per sample and needs no second pass.

    The dtype of the encoder is the precision of the attack. With `save_images` the images of all samples are kept, for
    `remeasure_retrieval`.

    Returns:
        One result for each direction, k and eps; `metric` is such as "image_to_text_recall@1".
    """
    results = []
    for direction in DIRECTIONS:
        task = Retrieval(encoder, tokenizer, dataset, direction, how.ks, how.batch_size)
        keep = task.ids if save_images else ()
        results += evaluate(task, how.robustness(direction), save_images=keep, **settings)
    return results


def remeasure_retrieval(
    encoder: DualEncoder, tokenizer: Any, dataset: CaptionedImages, result: RobustnessResult, folder: str | Path
) -> Remeasured:
    """Search with, or for, the saved images of a result of `evaluate_retrieval` again; see `measure_again`."""
    if result.task != Retrieval.task:
        raise ValueError(f"this measures retrieval results again, the given one is of the task {result.task!r}.")
    direction, _, k = result.metric.partition("_recall@")
    task = Retrieval(encoder, tokenizer, dataset, direction, (int(k),))
    return measure_again(task, result, folder)


@dataclass(frozen=True)
class CaptionLoss(PerSample):
    """How far an image is from its own captions, one loss per image.

    "margin" is the k-th best wrong similarity minus the best own one: positive exactly where recall at k fails. "nll"
    is the negative log-probability that a caption drawn by the model's softmax is an own one. `similarities` are scaled
    cosines with all captions, shape (batch, captions), of which `own` marks an image's own.
    """

    similarities: Callable[[Tensor], Tensor]
    own: Tensor
    k: int
    kind: str = "margin"

    def __call__(self, images: Tensor) -> Tensor:
        """Loss per image, shape (batch,)."""
        scores = self.similarities(images)
        if self.kind == "nll":
            return scores.logsumexp(1) - scores.masked_fill(~self.own, -torch.inf).logsumexp(1)
        wrong = scores.masked_fill(self.own, -torch.inf).topk(self.k, dim=1).values[:, -1]
        return wrong - scores.masked_fill(~self.own, -torch.inf).amax(1)


@dataclass(frozen=True)
class CaptionsLost(PerSample):
    """Success at k: at least k wrong captions are more similar than every own one."""

    loss: CaptionLoss

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Boolean flags, shape (batch,)."""
        return self.loss(images) > 0


@dataclass(frozen=True)
class ImageLost(PerSample):
    """Success at k: the k-th best other image of the gallery, at `bar`, is more similar to the caption."""

    embed: Callable[[Tensor], Tensor]
    captions: Tensor
    bar: Tensor

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Boolean flags, shape (batch,)."""
        return F.cosine_similarity(self.embed(images), self.captions, dim=1) < self.bar


def _rank(record: SampleRecord, attacked: bool = False) -> int:
    return int(record.adversarial if attacked and record.adversarial is not None else record.clean)


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]
