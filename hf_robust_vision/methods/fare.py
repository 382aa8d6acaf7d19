"""FARE: adversarial fine-tuning of the vision tower towards the original's clean embedding, without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from hf_robust_vision.attacks import Objective, squared_l2
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.training.base import Batch

from .features import FeatureArguments, FeatureTrainer


@dataclass
class FAREArguments(FeatureArguments):
    """Arguments of `FARETrainer`: those of every method on features."""


class FARETrainer(FeatureTrainer):
    """Fine-tune the vision tower so that a perturbed image keeps the original's embedding of the clean one.

    Attacker and learner look at the same number, `|| phi(x') - phi0(x) ||^2`: embeddings not normalised, summed over
    their dimensions (a mean would be some hundred times smaller, which matters to plain SGD), averaged over the batch.
    With `clean_drift_bound` (ours, after LORE) a weighted `|| phi(x) - phi0(x) ||^2` joins it.

    Relations:
        Sim-CLIP's form "frozen" is this with the cosine distance and half the gradient.

    Reference:
        FARE, https://huggingface.co/papers/2402.12336.
    """

    args_class = FAREArguments
    method: ClassVar[str] = "FARE"
    tag_names: ClassVar[tuple[str, ...]] = ("fare",)
    paper: ClassVar[str | None] = "2402.12336"
    pooled_distance = staticmethod(squared_l2)

    def attack_objective(self, encoder: Encoder, batch: Batch) -> Objective:
        """Distance to the original's features of the clean images."""
        return lambda images: self.distance(self.features(encoder, images), batch.original)

    def robust_loss(self, model: nn.Module, batch: Batch, adversarial: Tensor) -> Tensor:
        """The same distance, averaged over the batch; where the drift is bounded, with that of the clean images."""
        attacked, anchor = self.attacked_and_anchor(model, batch, adversarial)
        return self.distance(attacked, batch.original).mean() + anchor
