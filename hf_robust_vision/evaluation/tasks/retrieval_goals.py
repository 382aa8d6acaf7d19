"""What an attacker of retrieval raises, and when the search is lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class CaptionLoss:
    """How far an image is from its own captions, one loss per image.

    "margin" is the k-th best wrong similarity minus the best own one: positive exactly where recall at k fails. "nll"
    is the negative log-probability that a caption drawn by the model's softmax is an own one.

    Args:
        similarities: Images to scaled cosines with all captions, shape (batch, captions).
        own: Which captions are an image's own, same shape.
        k: Place to be pushed out of.
        kind: "margin" or "nll".
    """

    similarities: Callable[[Tensor], Tensor]
    own: Tensor
    k: int
    kind: str = "margin"

    def __call__(self, images: Tensor) -> Tensor:
        """One loss per image, shape (batch,)."""
        scores = self.similarities(images)
        if self.kind == "nll":
            return scores.logsumexp(1) - scores.masked_fill(~self.own, -torch.inf).logsumexp(1)
        wrong = scores.masked_fill(self.own, -torch.inf).topk(self.k, dim=1).values[:, -1]
        return wrong - scores.masked_fill(~self.own, -torch.inf).amax(1)

    def take(self, rows: Tensor) -> CaptionLoss:
        """The loss of some of the images."""
        return replace(self, own=self.own[rows])


@dataclass(frozen=True)
class CaptionsLost:
    """Success at k: at least k wrong captions are more similar than every own one."""

    loss: CaptionLoss

    def __call__(self, images: Tensor) -> Tensor:
        """Boolean flags, shape (batch,)."""
        with torch.no_grad():
            return self.loss(images) > 0

    def take(self, rows: Tensor) -> CaptionsLost:
        """The criterion for some of the images."""
        return replace(self, loss=self.loss.take(rows))


@dataclass(frozen=True)
class ImageLost:
    """Success at k: at least k other images are more similar to the caption.

    Args:
        embed: Images to embeddings.
        captions: Embeddings of the captions that search, shape (batch, dim).
        bar: Similarity of the k-th best other image of the gallery, shape (batch,).
    """

    embed: Callable[[Tensor], Tensor]
    captions: Tensor
    bar: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """Boolean flags, shape (batch,)."""
        with torch.no_grad():
            return F.cosine_similarity(self.embed(images), self.captions, dim=1) < self.bar

    def take(self, rows: Tensor) -> ImageLost:
        """The criterion for some of the images."""
        return replace(self, captions=self.captions[rows], bar=self.bar[rows])
