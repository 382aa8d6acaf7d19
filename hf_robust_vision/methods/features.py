"""What the methods without labels share: which features the loss looks at, and how far two sets of them are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
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
    """Base of the methods that draw the features of an adversarial image to those of the clean one.

    A method names its distance of pooled embeddings; `distance` is then that on the features that were asked for.
    """

    pooled_distance: Callable[[Tensor, Tensor], Tensor] = staticmethod(cosine_distance)

    args: FeatureArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.token_variance = token_variance(self.reference, self.train_dataset)
        self.distance = self.distance_by(self.pooled_distance)

    @classmethod
    def reads(cls, args: Any) -> Reads:
        """The features that were asked for."""
        return Reads(args.feature, args.token_layer)

    def features(self, model: Any, images: Tensor) -> EncoderOutput:
        """One forward pass that gives what `FeatureDistance` compares."""
        return model(images, token_layer=self.token_layer)

    def distance_by(self, pooled: Callable[[Tensor, Tensor], Tensor]) -> FeatureDistance:
        """The distance on the features that were asked for, with `pooled` on the pooled embeddings."""
        return FeatureDistance(self.args.feature, pooled, self.token_variance)


@dataclass(frozen=True)
class FeatureDistance:
    """Distance of encoder outputs per image, on the features that are to become robust.

    "pooled" compares the projected class-token embeddings by the distance `pooled`, "patch_tokens" the tokens h of one
    layer as `mean((h - h0)^2) / token_variance`, "both" adds the two.
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
            # Deep layers have tokens of any size; over their variance they count as much as the pooled term.
            error = (_wide(output.patch_tokens) - _wide(target.patch_tokens)).square().flatten(1).mean(1)
            distance = distance + error / self.token_variance
        assert isinstance(distance, Tensor)
        return distance


def token_variance(reference: Reference, dataset: Any, images: int = 64) -> float:
    """Variance of each token dimension over images and patches, averaged over the dimensions.

    1 if the reference reads no tokens or there is no dataset.
    """
    if reference.token_layer is None or dataset is None:
        return 1.0
    # Of the first images rather than of a batch: one number for every process, and the same again after a resume.
    sample = torch.stack([item["images"] for item in islice(dataset, images)])
    tokens = reference(sample.to(next(reference.encoder.parameters()).device)).patch_tokens
    return float(tokens.double().flatten(0, 1).var(0).mean())


def split_output(output: EncoderOutput, size: int) -> tuple[EncoderOutput, EncoderOutput]:
    """The first `size` images of an output, and the rest."""
    first = {key: value[:size] for key, value in output.items()}
    return EncoderOutput(**first), EncoderOutput(**{key: value[size:] for key, value in output.items()})


def detached(output: EncoderOutput) -> EncoderOutput:
    """The same values without gradient."""
    return EncoderOutput(**{key: value.detach() for key, value in output.items()})


def _wide(tensor: Tensor) -> Tensor:
    # Autocast hands out bfloat16, which has no number between 0.996 and 1: a small attack would change no cosine.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
