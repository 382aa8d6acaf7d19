"""Retrieval under attack: do images still find their captions, and captions their image?

Only images are attacked, never text. Each sample is attacked alone, in its own worst case:

- image to text: the image that searches is pushed away from its own captions, among all captions of the dataset;
- text to image: the image that a caption should find is pushed away from that caption; the rest of the gallery is clean.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_robust_vision import __version__
from hf_robust_vision.attacks import Attack, Ball, EmbeddingDistance, Logits, StartNoise, cosine_distance, make_ball
from hf_robust_vision.data.captions import CaptionedImages
from hf_robust_vision.evaluation.images import AdversarialImages, Remeasured, measure_again, need_task
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, summarize_hits, versions
from hf_robust_vision.evaluation.samples import Records, SampleStore, measure_all
from hf_robust_vision.pixels import check_images
from hf_robust_vision.towers.clip import (
    CLIPEncoder,
    attack_mode,
    image_embedder,
    tensor_sha256,
    text_embeddings,
    weights_sha256,
)
from hf_robust_vision.towers.text_bank import tokenize

from .retrieval_goals import CaptionLoss, CaptionsLost, ImageLost


DIRECTIONS = {
    "image_to_text": "the image that searches",
    "text_to_image": "the image to be found, the others stay clean",
}


@dataclass(frozen=True)
class RetrievalProtocol:
    """How the robustness of retrieval is measured.

    Args:
        eps: Radii, measured in rising order; what fell stays fallen.
        norm: "linf" or "l2".
        steps: APGD steps of each attack.
        restarts: Random starts of each attack.
        ks: A sample is a hit at k if what it searches is among the first k.
        batch_size: Images attacked at once.
        seed: Of the random starts.
    """

    eps: tuple[float, ...]
    norm: str = "linf"
    steps: int = 100
    restarts: int = 1
    ks: tuple[int, ...] = (1, 5)
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.eps or not self.ks or min(self.ks) < 1:
            raise ValueError(f"give at least one eps and one k of at least 1, got eps={self.eps} and ks={self.ks}.")
        for eps in self.eps:
            make_ball(self.norm, eps)
        self.attack("cosine")

    def attack(self, objective: str) -> Attack:
        """The attack that raises an objective."""
        return Attack(f"apgd-{objective}", "apgd", objective, self.steps, self.restarts)


class Stage(NamedTuple):
    """One attack on samples that search: success is to push what they search out of the first `k`."""

    attack: Attack
    k: int
    objective: Any
    fooled: Any


@dataclass(frozen=True)
class Search:
    """Samples that search, or are searched for, and the attacks on them.

    Args:
        samples: Images or captions of the dataset.
        images: Those to attack, one a sample, in [0, 1].
        stages: In order.
        ranks: Images, and the rows of the samples that they belong to, to the ranks of what these search.
    """

    samples: list[int]
    images: Tensor
    stages: Sequence[Stage]
    ranks: Callable[[Tensor, Tensor], Tensor]

    def strike(self, stage: Stage, rows: Tensor, ball: Ball, how: RetrievalProtocol) -> tuple[Tensor, Tensor]:
        """Ranks of some samples after one attack, shape (rows,), and the attacked images."""
        attack = how.attack(stage.attack.objective)
        noise = StartNoise(how.seed, [self.samples[row] for row in rows.tolist()])
        objective, fooled = stage.objective.take(rows), stage.fooled.take(rows)
        found = attack.run(objective, self.images[rows], ball, noise, fooled)
        with torch.no_grad():
            return self.ranks(found, rows), found


class Gallery:
    """Embeddings of a dataset and the attacks on it, in one direction or the other."""

    def __init__(self, encoder: CLIPEncoder, tokenizer: Any, dataset: CaptionedImages, how: RetrievalProtocol):
        self.dataset, self.how = dataset, how
        self.device = encoder.visual_projection.weight.device
        embed = image_embedder(encoder)
        self.embed = Logits(lambda images: F.normalize(embed(encoder.transform.fit(images)), dim=-1))
        self.scale = float(encoder.logit_scale.detach().exp())
        with torch.no_grad():
            self.captions = torch.cat([
                F.normalize(text_embeddings(encoder, tokenize(tokenizer, part, self.device)), dim=-1)
                for part in _parts(dataset.captions, 256)
            ])  # fmt: skip
            self.images = torch.cat([self.embed(self.load(p)) for p in _parts(range(len(dataset)), how.batch_size)])
        self.owners = torch.tensor(dataset.owners, device=self.device)

    def load(self, places: Sequence[int]) -> Tensor:
        """Images of the dataset, in [0, 1]."""
        return check_images(torch.stack([self.dataset.image(place) for place in places])).to(self.device)

    def samples(self, direction: str) -> range:
        """All that searches."""
        return range(len(self.dataset) if direction == "image_to_text" else len(self.dataset.captions))

    def search(self, direction: str, samples: list[int]) -> Search:
        """What some samples of a direction search, and the attacks on them."""
        return self._texts(samples) if direction == "image_to_text" else self._images(samples)

    def _texts(self, images: list[int]) -> Search:
        """The best own caption of each image."""
        own = self.owners[None] == torch.tensor(images, device=self.device)[:, None]
        similar = Logits(lambda batch: self.scale * self.embed(batch) @ self.captions.T)
        margin = CaptionLoss(similar, own, 1)
        stages = [
            Stage(
                self.how.attack(f"{kind}@{k}"), k, replace(margin, kind=kind, k=k), CaptionsLost(replace(margin, k=k))
            )
            for k in sorted(self.how.ks)
            for kind in ("nll", "margin")
        ]
        return Search(images, self.load(images), stages, lambda batch, rows: _caption_ranks(similar(batch), own[rows]))

    def _images(self, texts: list[int]) -> Search:
        """The own image of each caption; one attack serves every k."""
        captions, owners = self.captions[texts], self.owners[texts]
        others = (captions @ self.images.T).scatter(1, owners[:, None], -torch.inf)
        k = max(self.how.ks)
        away = EmbeddingDistance(self.embed, captions, cosine_distance)
        lost = ImageLost(self.embed, captions, others.topk(k, dim=1).values[:, -1])

        def ranks(batch: Tensor, rows: Tensor) -> Tensor:
            return (others[rows] > (self.embed(batch) * captions[rows]).sum(1, keepdim=True)).sum(1)

        return Search(texts, self.load(owners.tolist()), [Stage(self.how.attack("cosine"), k, away, lost)], ranks)

    def measure(
        self, direction: str, samples: list[int], saved: AdversarialImages | None = None, keep: Collection[int] = ()
    ) -> Records:
        """Worst rank of what each sample searches, for each radius: the stages in order, each on those under its k.

        The images of the samples in `keep` are saved, those that the worst ranks are of.
        """
        how, search = self.how, self.search(direction, samples)
        with torch.no_grad():
            worst = search.ranks(search.images, torch.arange(len(samples), device=self.device))
        latest = [
            SampleRecord(sample, 0, rank, fooled_by="clean" if rank else None)
            for sample, rank in zip(samples, worst.tolist())
        ]
        records: Records = {sample: [] for sample in samples}
        found: list[dict[float, Tensor]] = [{} for _ in samples]
        for eps in how.eps:
            for stage in search.stages if eps > 0 else ():
                rows = (worst < stage.k).nonzero().flatten()
                if len(rows) == 0:
                    continue
                ranks, attacked = search.strike(stage, rows, make_ball(how.norm, eps), how)
                for row, rank, image in zip(rows.tolist(), ranks.tolist(), attacked):
                    if rank > worst[row]:
                        found[row][eps] = image
                worst[rows] = torch.maximum(worst[rows], ranks)
                for row, rank in zip(rows.tolist(), worst[rows].tolist()):
                    fooled_by = latest[row].fooled_by or (stage.attack.name if rank else None)
                    latest[row] = replace(latest[row], adversarial=rank, fooled_by=fooled_by)
            for record in latest:
                records[int(record.id)].append(record)
        for row, sample in enumerate(samples):  # before the records, which say that the samples are done
            if saved is not None and sample in keep:
                saved.write(sample, search.images[row], found[row])
        return records


def evaluate_retrieval(
    encoder: CLIPEncoder,
    tokenizer: Any,
    dataset: CaptionedImages,
    how: RetrievalProtocol,
    *,
    model_name: str,
    samples_dir: str | Path | None = None,
    progress: bool = True,
    save_images: bool = False,
) -> list[RobustnessResult]:
    """Recall at k, clean and under attack, of images for captions and of captions for images.

    A sample's record holds the rank of what it searches, 0 for the first place: `clean`, and `adversarial` for the
    worst that the attacks reached. It is a hit at k where the rank is under k; `fooled_by` is about the first place.
    Resumable and shared out over processes like `evaluate_zero_shot`; the model is left as it was.

    Deviation: published image-text attacks perturb every image of the gallery at once, without knowing the query. Here
    the caption's own image is attacked for each caption, which is a worst case per sample and needs no second pass.

    Args:
        encoder: Its dtype is the precision of the attack.
        tokenizer: Of its text tower.
        dataset: Images with captions.
        how: Attacks, radii and ks.
        model_name: "before", "after", or a path, for the results.
        samples_dir: Folder for `samples-*.jsonl`.
        progress: Show a bar on the main process.
        save_images: Keep the images of all samples in `samples_dir`, clean and adversarial, for
            `remeasure_retrieval`. What was measured without them is measured again.

    Returns:
        One result for each direction, k and eps; `metric` is such as "image_to_text_recall@1".

    Raises:
        ValueError: If the dataset is too small for the largest k to be missed, or images have no folder to go to.
    """
    if save_images and samples_dir is None:
        raise ValueError("save_images needs a samples_dir to save them in.")
    if max(how.ks) >= len(dataset):
        raise ValueError(f"recall at {max(how.ks)} of {len(dataset)} images is always 1; choose smaller ks.")
    start, how = time.time(), replace(how, eps=tuple(sorted(how.eps)))
    sha256, dtype = weights_sha256(encoder), encoder.visual_projection.weight.dtype
    results = []
    with attack_mode(encoder):
        gallery = Gallery(encoder, tokenizer, dataset, how)
        identity = asdict(how) | {"weights": sha256, "data": dataset.name, "split": dataset.split, "dtype": str(dtype)}
        identity |= {"captions": dataset.captions, "owners": dataset.owners, "texts": tensor_sha256(gallery.captions)}
        identity |= {"rows": getattr(dataset.rows, "_fingerprint", ""), "version": __version__}
        identity |= {"pixels": asdict(encoder.transform), "fit": asdict(dataset.transform)}
        del identity["batch_size"]
        for direction in DIRECTIONS:
            ids = gallery.samples(direction)
            label = f"{Path(model_name).name}-{direction}-{how.norm}"
            store = SampleStore(samples_dir, label, how.eps, identity)
            saved = AdversarialImages(Path(samples_dir or "") / store.images)
            keep = ids if save_images else ()
            store.forget({sample for sample in keep if sample not in saved})
            measure = partial(gallery.measure, direction, saved=saved, keep=keep)
            bar = f"{model_name}: {direction.replace('_', ' ')}"
            records = measure_all(store, ids, measure, batch_size=how.batch_size, label=bar, progress=progress)
            for k in how.ks:
                for place, eps in enumerate(how.eps):
                    rows = [records[sample][place] for sample in ids]
                    result = RobustnessResult(
                        task="retrieval",
                        model=model_name,
                        model_sha256=sha256,
                        dataset=dataset.name,
                        split=dataset.split,
                        metric=f"{direction}_recall@{k}",
                        protocol=f"retrieval-apgd-{how.steps}",
                        eps=eps,
                        norm=how.norm,
                        attacks=_describe(direction, how, dataset, dtype),
                        logit_scale=gallery.scale,
                        samples=store.names[place] if samples_dir is not None else None,
                        images=store.images if samples_dir is not None and saved.ids() else None,
                        seconds=time.time() - start,
                        versions=versions(),
                        **summarize_hits([_rank(row) < k for row in rows], [_rank(row, True) < k for row in rows]),
                    )
                    results.append(result)
    return results


def remeasure_retrieval(
    encoder: CLIPEncoder, tokenizer: Any, dataset: CaptionedImages, result: RobustnessResult, folder: str | Path
) -> Remeasured:
    """Search with, or for, the saved images of a result again, without any attack, and compare with its records.

    Args:
        encoder: The model that was measured, in the dtype that it was measured in.
        tokenizer: Of its text tower.
        dataset: That was measured on.
        result: Of `evaluate_retrieval`, with saved images.
        folder: Where the `robustness.json` of the result lies.

    Raises:
        ValueError: If the model or the task is another, or no images were saved.
    """
    need_task(result, "retrieval")
    direction, _, k = result.metric.partition("_recall@")
    how = RetrievalProtocol(eps=(result.eps,), norm=result.norm, ks=(int(k),))
    with torch.no_grad(), attack_mode(encoder):
        gallery = Gallery(encoder, tokenizer, dataset, how)

        def hits(records: Sequence[SampleRecord], images: Tensor) -> list[bool]:
            search, rows = gallery.search(direction, [int(record.id) for record in records]), range(len(records))
            ranks = search.ranks(check_images(images).to(gallery.device), torch.tensor(rows, device=gallery.device))
            return [rank < int(k) for rank in ranks.tolist()]

        def told(record: SampleRecord) -> tuple[bool, bool]:
            return _rank(record) < int(k), _rank(record, True) < int(k)

        return measure_again(result, folder, weights_sha256(encoder), hits, told=told)


def _caption_ranks(scores: Tensor, own: Tensor) -> Tensor:
    """How many wrong captions are more similar than the best own one, shape (batch,)."""
    best = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    return ((scores > best) & ~own).sum(1)


def _rank(record: SampleRecord, attacked: bool = False) -> int:
    return int(record.adversarial if attacked and record.adversarial is not None else record.clean)


def _parts(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _describe(
    direction: str, how: RetrievalProtocol, dataset: CaptionedImages, dtype: torch.dtype
) -> list[dict[str, Any]]:
    kinds = [f"{kind}@{k}" for k in sorted(how.ks) for kind in ("nll", "margin")]
    size = dataset.transform.crop or dataset.transform.resize
    about: dict[str, Any] = {
        "resolution": size if isinstance(size, int) else max(size),
        "seed": how.seed,
        "dtype": dtype,
    }
    return [
        how.attack(kind).describe(make_ball(how.norm, how.eps[0]), target=DIRECTIONS[direction], **about)
        for kind in (kinds if direction == "image_to_text" else ["cosine"])
    ]
