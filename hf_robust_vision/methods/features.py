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
from hf_robust_vision.training.base import AdversarialTrainer, Batch
from hf_robust_vision.training.config import AdversarialTrainingArguments, need_number, one_of

from .drift import DualWeight


@dataclass
class FeatureArguments(AdversarialTrainingArguments):
    """Arguments of `FeatureTrainer`; only the added fields are listed.

    Args:
        feature: "pooled" (the papers), "patch_tokens" or "both"; "language_tokens", which the language model of a VLM
            reads, or "language_and_patch_tokens".
        token_layer: Entry of `hidden_states` that the patch tokens come from; -2 is what LLaVA reads.
        token_distance: Between tokens: "squared_l2", over their variance, or "cosine".
        clean_drift_bound: How far clean images may drift from the original, relative to its features, see `DualWeight`:
            the weight of their distance is then found while training. It costs a pass over the clean images where the
            method makes none.
        dual_step_size: What that weight gains in an update whose drift is twice the bound.
    """

    feature: str = field(default="pooled", metadata={"help": f"{', '.join(FEATURES)}."})
    token_layer: int = field(default=-2, metadata={"help": "Layer of the patch tokens; -2 is what LLaVA reads."})
    token_distance: str = field(default="squared_l2", metadata={"help": "squared_l2 or cosine."})
    clean_drift_bound: float | None = field(
        default=None, metadata={"help": "Most that clean images may drift, e.g. 0.05 (of 1); default: no bound."}
    )
    dual_step_size: float = field(default=0.1, metadata={"help": "Step of the weight that holds clean_drift_bound."})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("feature", self.feature, tuple(FEATURES))
        one_of("token_distance", self.token_distance, ("squared_l2", "cosine"))
        for name in ("clean_drift_bound", "dual_step_size"):
            need_number(self, name)
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0, got 0; leave it out for no bound on clean drift.")


class FeatureTrainer(AdversarialTrainer):
    """Base of the methods that draw the features of an adversarial image to those of the clean one.

    A method names its distance of pooled embeddings; `distance` is then that on the features that were asked for.
    """

    pooled_distance: Callable[[Tensor, Tensor], Tensor] = staticmethod(cosine_distance)

    args: FeatureArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.token_variances = token_variances(self.reference, self.train_dataset)
        self.distance = self.distance_by(self.pooled_distance)
        bound, step_size = self.args.clean_drift_bound, self.args.dual_step_size
        self.dual = None if bound is None else DualWeight(bound, self.anchor_weight, step_size)

    @property
    def anchor_weight(self) -> float:
        """Weight of the clean images' distance to the original; with `clean_drift_bound` where it starts."""
        return 0.0

    @property
    def holds_clean(self) -> bool:
        """Whether the loss looks at where clean images go."""
        return self.dual is not None or self.anchor_weight > 0

    def anchor(self, clean: EncoderOutput, batch: Batch) -> Tensor:
        """The weighted distance of clean images to the original, one value per image."""
        distance = self.distance(clean, batch.original)
        if self.dual is None:
            return self.anchor_weight * distance
        nothing = EncoderOutput(**{key: torch.zeros_like(value) for key, value in batch.original.items()})
        self.dual.observe(distance, self.distance(batch.original, nothing))
        return self.dual.weight * distance

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As ever; after the last part of an update the weight that holds the drift takes its step."""
        loss = super().training_step(*args, **kwargs)
        if self.dual is not None and self.accelerator.sync_gradients:
            self.record("drift_weight", torch.tensor(self.dual.weight, device=loss.device))  # that of this update
            drift = self.dual.update(self.accelerator.reduce)
            self.record("clean_drift", torch.tensor(drift, device=loss.device))
        return loss

    def more_state(self) -> dict[str, Tensor]:
        """With the weight that holds the drift."""
        own = {} if self.dual is None else {"drift_weight": torch.tensor(self.dual.weight, dtype=torch.float64)}
        return super().more_state() | own

    def take_more_state(self, state: dict[str, Tensor]) -> None:
        """With the weight that holds the drift."""
        super().take_more_state(state)
        if self.dual is not None:
            self.dual.weight = state["drift_weight"].item()

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
