"""What the methods without labels share: which features the loss looks at, and how far two sets of them are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_robust_vision.attacks import cosine_distance
from hf_robust_vision.towers.base import EncoderOutput
from hf_robust_vision.towers.clip import FEATURES
from hf_robust_vision.towers.reference import Reference
from hf_robust_vision.training.base import AdversarialTrainer
from hf_robust_vision.training.config import AdversarialTrainingArguments, one_of
from hf_robust_vision.training.layers import Reads


@dataclass
class FeatureArguments(AdversarialTrainingArguments):
    """Arguments of `FeatureTrainer`; only the added fields are listed.

    Args:
        feature: "pooled" (the papers), "patch_tokens" or "both"; a VLM reads patch tokens.
        token_layer: Entry of `hidden_states` that the tokens come from; -2 is what LLaVA reads.
    """

    feature: str = field(default="pooled", metadata={"help": "pooled, patch_tokens or both."})
    token_layer: int = field(default=-2, metadata={"help": "Layer of the patch tokens; -2 is what LLaVA reads."})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("feature", self.feature, FEATURES)


class FeatureTrainer(AdversarialTrainer):
    """Base of the methods that draw the features of an adversarial image to those of the clean one."""

    args: FeatureArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.token_variance = token_variance(self.reference, self.train_dataset)

    @classmethod
    def reads(cls, args: Any) -> Reads:
        """The features that were asked for."""
        return Reads(args.feature, args.token_layer)

    def features(self, model: Any, images: Tensor) -> EncoderOutput:
        """One forward pass that gives what `FeatureDistance` compares."""
        return model(images, token_layer=self.token_layer)

    def distance_by(self, pooled: Callable[[Tensor, Tensor], Tensor]) -> FeatureDistance:
        """The distance on the features that were asked for.

        Args:
            pooled: Distance of pooled embeddings, `cosine_distance` or `squared_l2`.
        """
        return FeatureDistance(self.args.feature, pooled, self.token_variance)


@dataclass(frozen=True)
class FeatureDistance:
    """Distance of encoder outputs per image, on the features that are to become robust.

    `pooled` compares the projected class-token embeddings v; `patch_tokens` the tokens h of one layer, as
    `mean((h - h0)^2) / variance`; `both` adds the two.

    Args:
        feature: "pooled", "patch_tokens" or "both".
        pooled: Distance of pooled embeddings, `cosine_distance` or `squared_l2`.
        token_variance: Variance of the original's tokens on clean images, see `token_variance`.
    """

    feature: str
    pooled: Callable[[Tensor, Tensor], Tensor] = cosine_distance
    token_variance: float = 1.0

    def __call__(self, output: EncoderOutput, target: EncoderOutput) -> Tensor:
        """One distance per image, shape (batch,), in float32 at least."""
        distance: Tensor | float = 0.0
        if self.feature != "patch_tokens":
            distance = self.pooled(_wide(output.image_embeds), _wide(target.image_embeds))
        if self.feature != "pooled":
            error = (_wide(output.patch_tokens) - _wide(target.patch_tokens)).square().flatten(1).mean(1)
            distance = distance + error / self.token_variance
        assert isinstance(distance, Tensor)
        return distance


def token_variance(reference: Reference, dataset: Any, images: int = 64) -> float:
    """Variance of each token dimension over images and patches, averaged over the dimensions.

    Measured with the original model on the first clean images of the dataset, so that it is one fixed number
    whatever the batch, the rank or a resume. 1 if the reference reads no tokens or there is no dataset.

    Args:
        reference: The original model.
        dataset: Items with "images".
        images: How many of them to use.
    """
    if reference.token_layer is None or dataset is None:
        return 1.0
    sample = torch.stack([item["images"] for item in islice(dataset, images)])
    tokens = reference(sample.to(next(reference.encoder.parameters()).device)).patch_tokens
    return float(tokens.double().flatten(0, 1).var(0).mean())


def split_output(output: EncoderOutput, size: int) -> tuple[EncoderOutput, EncoderOutput]:
    """The first `size` images of an output, and the rest."""
    first = {key: value[:size] for key, value in output.items()}
    return EncoderOutput(**first), EncoderOutput(**{key: value[size:] for key, value in output.items()})


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of every row of one tensor with every row of another, in float32 at least whatever the autocast.

    Args:
        first: Shape (rows, dim), not necessarily normalised.
        second: Shape (columns, dim), on any device.

    Returns:
        Shape (rows, columns).
    """
    wide = _wide(first)
    with torch.autocast(wide.device.type, enabled=False):
        return F.normalize(wide, dim=-1) @ F.normalize(second.to(wide), dim=-1).T


def detached(output: EncoderOutput) -> EncoderOutput:
    """The same values without gradient."""
    return EncoderOutput(**{key: value.detach() for key, value in output.items()})


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.half, torch.bfloat16) else tensor
