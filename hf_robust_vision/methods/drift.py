"""How much clean images may drift: the weight of the anchor as a dual variable, so that a bound is given and no weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.attacks import cosine_distance
from hf_robust_vision.towers.base import EncoderOutput
from hf_robust_vision.training.base import AdversarialTrainer, Batch
from hf_robust_vision.training.config import AdversarialTrainingArguments, need_number


@dataclass
class DriftArguments(AdversarialTrainingArguments):
    """Arguments of `DriftTrainer`; only the added fields are listed.

    Args:
        clean_drift_bound: How far clean images may drift from the original on average, relative to its features, see
            `DualWeight`; it is aimed at, and a short run may end above it. The weight
            of their distance is then found while training. It costs a pass over the clean images where the method makes
            none.
        dual_step_size: What that weight gains in an update whose drift is twice the bound.
    """

    clean_drift_bound: float | None = field(
        default=None, metadata={"help": "Most that clean images may drift, e.g. 0.05 (of 1); default: no bound."}
    )
    dual_step_size: float = field(default=0.1, metadata={"help": "Step of the weight that holds clean_drift_bound."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, without in {"clean_drift_bound": "no bound on clean drift", "dual_step_size": "the default"}.items():
            need_number(self, name)
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be above 0, got 0; leave it out for {without}.")


class DualWeight:
    """The weight `w` of the clean images' distance to the original, by dual ascent on a bound of their drift.

    Drift is that distance over the distance of features that are all zero: `1 - cos` for cosines, and
    `||phi(x) - phi0(x)||^2 / ||phi0(x)||^2` for squared ones, sums over the images of an update in both. After each
    update `w <- max(0, w + step_size * (drift / bound - 1))`: it rises while the drift is over the bound, and falls to 0
    where the loss keeps below it by itself.

    Deviation: LORE bounds every image and learns a network of weights; this bounds the mean, by one number.

    Reference:
        LORE, https://huggingface.co/papers/2505.18884.
    """

    def __init__(self, bound: float, weight: float, step_size: float):
        self.bound, self.weight, self.step_size = bound, weight, step_size
        self._seen: list[Tensor] = []

    def observe(self, distances: Tensor, sizes: Tensor) -> None:
        """Remember some images of an update: their distances to the original, and those of zeros, shape (batch,) both."""
        self._seen.append(torch.stack([distances.detach().sum(), sizes.detach().sum()]))

    def update(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> float:
        """Take a step by all images since the last, and return their drift; `total` sums a tensor over the processes.

        Raises:
            ValueError: If the drift is not finite, since a weight made of it would look like one, or the weight is not.
        """
        # Of sums: the images of an update may lie on any number of processes, and come in any number of parts.
        distance, size = total(torch.stack(self._seen).sum(0))
        self._seen = []
        drift = float(distance / size)
        if not math.isfinite(drift):
            raise ValueError("the drift of clean images is not finite; type a smaller --learning_rate.")
        weight = max(0.0, self.weight + self.step_size * (drift / self.bound - 1))
        if not math.isfinite(weight):
            raise ValueError(
                f"the weight that holds clean_drift_bound={self.bound:g} is not finite; type a larger "
                "--clean_drift_bound or a smaller --dual_step_size."
            )
        self.weight = weight
        return drift


class DriftTrainer(AdversarialTrainer):
    """Base of the methods that can hold clean images near the original, at a given weight or within a given bound."""

    args: DriftArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        bound, step_size = self.args.clean_drift_bound, self.args.dual_step_size
        self.dual = None if bound is None else DualWeight(bound, self.anchor_weight, step_size)

    def drift_distance(self, clean: EncoderOutput, original: EncoderOutput) -> Tensor:
        """How far clean images are from the original, one value each; by default of the cosine of pooled embeddings."""
        wide = torch.promote_types(clean.image_embeds.dtype, torch.float32)
        return cosine_distance(clean.image_embeds.to(wide), original.image_embeds.to(wide))

    def encode(self, model: Any, images: Tensor) -> EncoderOutput:
        """One forward pass that gives what the loss reads."""
        return model(images)

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
        distance = self.drift_distance(clean, batch.original)
        if self.dual is None:
            return self.anchor_weight * distance
        nothing = EncoderOutput(**{key: torch.zeros_like(value) for key, value in batch.original.items()})
        self.dual.observe(distance, self.drift_distance(batch.original, nothing))
        return self.dual.weight * distance

    def clean_and_attacked(self, model: Any, batch: Batch, adversarial: Tensor) -> tuple[EncoderOutput, EncoderOutput]:
        """Features of the clean images and of the adversarial ones."""
        # One pass through the wrapper: it is faster than two, and under FSDP2 the weights are gathered once.
        return split_output(self.encode(model, torch.cat([batch.images, adversarial])), len(adversarial))

    def attacked_and_anchor(
        self, model: Any, batch: Batch, adversarial: Tensor
    ) -> tuple[EncoderOutput, Tensor | float]:
        """Of a method whose own loss reads adversarial images only: their features, and the mean `anchor` to be added."""
        if not self.holds_clean:
            return self.encode(model, adversarial), 0.0
        clean, attacked = self.clean_and_attacked(model, batch, adversarial)
        return attacked, self.anchor(clean, batch).mean()

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


def split_output(output: EncoderOutput, size: int) -> tuple[EncoderOutput, EncoderOutput]:
    """The first `size` images of an output, and the rest."""
    first = {key: value[:size] for key, value in output.items()}
    return EncoderOutput(**first), EncoderOutput(**{key: value[size:] for key, value in output.items()})
