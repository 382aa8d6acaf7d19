"""TIMA's gate and margin on a model that was not hardened: for which classes the one opens, whether the other is of the right size.

Of the clean validation photos of the training set, as the original model sees them: the share of wrong classes that the
gate opens for, by eta, and the eta that opens it for a given share; the gap that the margin requires beside the one that
the model has; and how the gap that it has goes with the similarity of two class texts, which tells the two readings of
the margin apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from compare_run import Data
from torch import Tensor

from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.splits import seeded_subset
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.methods.classes import cosines
from hf_robust_vision.methods.tima import TIMAArguments, confusable, required_gap
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import make_text_bank


ETAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SHARES = (0.01, 0.05, 0.2)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
MODES = ("distance", "similarity", "constant")


def margins(benchmark: Data, images: int) -> dict[str, Any]:
    """Everything that the page says, of at most so many validation photos."""
    encoder = load_encoder(benchmark.checkpoint)
    (part,) = benchmark.measured("validation", encoder.transform).values()
    part = seeded_subset(part, images, seed=0)
    tokenizer, templates = load_tokenizer(benchmark.checkpoint), get_templates(benchmark.templates)
    bank = make_text_bank(encoder, tokenizer, part.class_names, templates)
    with torch.no_grad():
        batches = [range(start, min(start + 64, len(part))) for start in range(0, len(part), 64)]
        embeds = [encoder(collate_images([part[i] for i in batch])["images"]).image_embeds for batch in batches]
    labels = torch.tensor(part.labels())
    seen = cosines(torch.cat(embeds), bank.embeddings)
    found = describe(seen, bank.embeddings, labels, bank.logit_scale)
    return {"dataset": part.name, "num_samples": len(part), "classes": len(part.class_names)} | found


def describe(seen: Tensor, texts: Tensor, labels: Tensor, scale: float) -> dict[str, Any]:
    """The numbers, of cosines of images and class texts of shape (images, classes), and of the texts themselves.

    `scale` turns cosines into logits.
    """
    margin = TIMAArguments.margin
    wrong = torch.ones_like(seen, dtype=torch.bool).scatter(1, labels[:, None], False)
    had = seen.gather(1, labels[:, None]) - seen
    nearest = had.masked_fill(~wrong, torch.inf).amin(1)
    similarity = cosines(texts, texts)[labels]
    gaps = {mode: required_gap(texts, labels, margin=margin, mode=mode) for mode in MODES}
    pair_margins, pair_similarities = _by_pair(had, texts, labels)
    return {
        "clean_accuracy": (nearest > 0).double().mean().item(),
        "logit_scale": scale,
        "gate_open": [
            {"eta": eta} | {gate: _open(seen, labels, eta, scale, gate, wrong) for gate in ("class", "sample")}
            for eta in ETAS
        ],
        "eta_for_share": [{"share": share, "eta": _eta_for(had, seen, labels, wrong, share)} for share in SHARES],
        "had": {"all wrong classes": _quantiles(had[wrong]), "the nearest wrong class": _quantiles(nearest)},
        "required": {mode: _quantiles(gap[wrong]) for mode, gap in gaps.items()},
        "met": {mode: (had >= gap)[wrong].double().mean().item() for mode, gap in gaps.items()},
        "similarity": _quantiles(similarity[wrong]),
        "correlation": {
            "pearson": pearson(pair_margins, pair_similarities),
            "spearman": pearson(_ranks(pair_margins), _ranks(pair_similarities)),
            "class_pairs": len(pair_margins),
            "pearson_by_image": pearson(had[wrong], similarity[wrong]),
        },
    }


def pearson(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of two vectors."""
    return float(torch.corrcoef(torch.stack([first, second]).double())[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks, equal values sharing the mean of theirs."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[place]


def _by_pair(had: Tensor, texts: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean gap of each pair of a true and a wrong class, and the similarity of their texts; of classes that have images."""
    present = labels.unique()
    means = torch.stack([had[labels == label].mean(0) for label in present])
    wrong = torch.ones_like(means, dtype=torch.bool).scatter(1, present[:, None], False)
    return means[wrong], cosines(texts, texts)[present][wrong]


def _open(seen: Tensor, labels: Tensor, eta: float, scale: float, gate: str, wrong: Tensor) -> float:
    return confusable(seen, labels, eta=eta, scale=scale, gate=gate)[wrong].double().mean().item()


def _eta_for(had: Tensor, seen: Tensor, labels: Tensor, wrong: Tensor, share: float) -> float:
    """The eta at which the gate by class opens for a share of the wrong classes."""
    # Open is had <= (1 - eta) |true cosine|: the eta at which each class opens.
    opens = 1 - had / seen.gather(1, labels[:, None]).abs()
    values = opens[wrong].double().sort(descending=True).values
    return float(values[max(round(share * len(values)) - 1, 0)])


def _quantiles(values: Tensor) -> dict[str, float]:
    ordered = values.double().sort().values
    places: Sequence[int] = [round(share * (len(ordered) - 1)) for share in QUANTILES]
    return {f"{100 * share:g} %": float(ordered[place]) for share, place in zip(QUANTILES, places)}
