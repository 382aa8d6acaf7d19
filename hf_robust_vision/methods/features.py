"""What the methods without labels share: which features the loss looks at, and how far two sets of them are apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_robust_vision.attacks import cosine_distance
from hf_robust_vision.towers.base import FEATURES, EncoderOutput, Reads
from hf_robust_vision.towers.reference import Reference
from hf_robust_vision.training.config import one_of

from .drift import DriftArguments, DriftTrainer


@dataclass
class FeatureArguments(DriftArguments):
    """Arguments of `FeatureTrainer`; only the added fields are listed.

    Args:
        feature: "pooled" (the papers), "patch_tokens" or "both"; "language_tokens", which the language model of a VLM
            reads, or "language_and_patch_tokens".
        token_layer: Entry of `hidden_states` that the patch tokens come from; -2 is what LLaVA reads.
        token_distance: Between tokens: "squared_l2", over their variance, or "cosine".
    """

    feature: str = field(default="pooled", metadata={"help": f"{', '.join(FEATURES)}."})
    token_layer: int = field(default=-2, metadata={"help": "Layer of the patch tokens; -2 is what LLaVA reads."})
    token_distance: str = field(default="squared_l2", metadata={"help": "squared_l2 or cosine."})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("feature", self.feature, tuple(FEATURES))
        one_of("token_distance", self.token_distance, ("squared_l2", "cosine"))


class FeatureTrainer(DriftTrainer):
    """Base of the methods that draw the features of an adversarial image to those of the clean one.

    A method names its distance of pooled embeddings; `distance` is then that on the features that were asked for.
    """

    pooled_distance: Callable[[Tensor, Tensor], Tensor] = staticmethod(cosine_distance)

    args: FeatureArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.token_variances = token_variances(self.reference, self.train_dataset)
        self.distance = self.distance_by(self.pooled_distance)

    def drift_distance(self, clean: EncoderOutput, original: EncoderOutput) -> Tensor:
        """The method's own, on the features that were asked for."""
        return self.distance(clean, original)

    def encode(self, model: Any, images: Tensor) -> EncoderOutput:
        """As `features`."""
        return self.features(model, images)

    @classmethod
    def reads(cls, args: Any) -> Reads:
        """The features that were asked for."""
        return Reads(args.feature, args.token_layer)

    def features(self, model: Any, images: Tensor) -> EncoderOutput:
        """One forward pass that gives what `FeatureDistance` compares."""
        return model(images, **self.asked)

    def distance_by(self, pooled: Callable[[Tensor, Tensor], Tensor]) -> FeatureDistance:
        """The distance on the features that were asked for, with `pooled` on the pooled embeddings."""
        return FeatureDistance(self.args.feature, pooled, self.token_variances, self.args.token_distance)


@dataclass(frozen=True)
class FeatureDistance:
    """Distance of encoder outputs per image, on the features that are to become robust: a sum over those of `FEATURES`.

    Pooled embeddings are compared by the distance `pooled`; tokens h of one layer as `mean((h - h0)^2) / variance`, or
    as the mean of `1 - cosine` over the tokens.

    """

    feature: str
    pooled: Callable[[Tensor, Tensor], Tensor] = cosine_distance
    variances: tuple[float, ...] = ()  # one of each layer that gives tokens, see `token_variances`; else 1
    token_distance: str = "squared_l2"  # or "cosine"

    def __call__(self, output: EncoderOutput, target: EncoderOutput) -> Tensor:
        """One distance per image, shape (batch,), in float32 at least."""
        distance: Tensor | float = 0.0
        if "image_embeds" in FEATURES[self.feature]:
            distance = self.pooled(_wide(output.image_embeds), _wide(target.image_embeds))
        variances = self.variances or repeat(1.0)
        layers = zip(token_layers(output, self.feature), token_layers(target, self.feature), variances)
        for tokens, original, variance in layers:
            if self.token_distance == "cosine":
                distance = distance + (1 - F.cosine_similarity(_wide(tokens), _wide(original), dim=-1)).mean(1)
            else:
                # Deep layers have tokens of any size; over their variance they count as much as the pooled term.
                distance = distance + (_wide(tokens) - _wide(original)).square().flatten(1).mean(1) / variance
        assert isinstance(distance, Tensor)
        return distance


def token_layers(output: EncoderOutput, feature: str) -> list[Tensor]:
    """The tokens among the features that were asked for, each of shape (batch, tokens, width)."""
    found: list[Tensor] = []
    for entry in FEATURES[feature]:
        if entry != "image_embeds" and (value := output.get(entry)) is not None:
            found += value.unbind(2) if entry == "deepstack_tokens" else [value]
    return found


def token_variances(reference: Reference, dataset: Any, images: int = 64) -> tuple[float, ...]:
    """Variance of each token dimension over images and places, averaged over the dimensions; one of each layer.

    None of them, which stands for 1, if the reference reads no tokens or there is no dataset.
    """
    feature = reference.reads.feature
    if feature == "pooled" or dataset is None:
        return ()
    # Of the first images rather than of a batch: one number for every process, and the same again after a resume.
    sample = torch.stack([item["images"] for item in islice(dataset, images)])
    output = reference(sample.to(next(reference.encoder.parameters()).device))
    return tuple(float(tokens.double().flatten(0, 1).var(0).mean()) for tokens in token_layers(output, feature))


def detached(output: EncoderOutput) -> EncoderOutput:
    """The same values without gradient."""
    return EncoderOutput(**{key: value.detach() for key, value in output.items()})


def _wide(tensor: Tensor) -> Tensor:
    # Autocast hands out bfloat16, which has no number between 0.996 and 1: a small attack would change no cosine.
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
