"""FARE: adversarial fine-tuning of the vision tower towards the original's clean embedding, without labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from hf_robust_vision.attacks import Objective, squared_l2
from hf_robust_vision.towers.clip import FEATURES, Encoder, token_layer_of
from hf_robust_vision.training.base import AdversarialTrainer, Batch
from hf_robust_vision.training.config import AdversarialTrainingArguments, one_of

from .features import FeatureDistance, token_variance


@dataclass
class FAREArguments(AdversarialTrainingArguments):
    """Arguments of `FARETrainer`; only the added fields are listed.

    Args:
        feature: "pooled" (the paper), "patch_tokens" or "both"; a VLM reads patch tokens.
        token_layer: Entry of `hidden_states` that the tokens come from; -2 is what LLaVA reads.
    """

    feature: str = field(default="pooled", metadata={"help": "pooled, patch_tokens or both."})
    token_layer: int = field(default=-2, metadata={"help": "Layer of the patch tokens; -2 is what LLaVA reads."})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("feature", self.feature, FEATURES)


class FARETrainer(AdversarialTrainer):
    """Fine-tune the vision tower so that a perturbed image keeps the original's embedding of the clean one.

    Attacker and learner look at the same number, `|| phi(x') - phi0(x) ||^2`: embeddings not normalised, summed over
    their dimensions (a mean would be some hundred times smaller, which matters to plain SGD), averaged over the batch.

    Relations:
        Sim-CLIP's form "frozen" is this with the cosine distance and half the gradient.

    Reference:
        FARE, https://huggingface.co/papers/2402.12336.
    """

    args_class = FAREArguments
    method: ClassVar[str] = "FARE"
    tag_names: ClassVar[tuple[str, ...]] = ("fare",)
    paper: ClassVar[str | None] = "2402.12336"

    args: FAREArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        variance = token_variance(self.reference, self.train_dataset)
        self.distance = FeatureDistance(self.args.feature, self.args.token_layer, squared_l2, variance)

    @classmethod
    def token_layer_of(cls, args: Any) -> int | None:
        """The layer whose patch tokens the loss reads."""
        return token_layer_of(args.feature, args.token_layer)

    def attack_objective(self, encoder: Encoder, batch: Batch) -> Objective:
        """Distance to the original's features of the clean images."""
        return lambda images: self.distance(encoder(images, token_layer=self.token_layer), batch.original)

    def robust_loss(self, model: nn.Module, batch: Batch, adversarial: Tensor) -> Tensor:
        """The same distance, averaged over the batch."""
        return self.distance(model(adversarial, token_layer=self.token_layer), batch.original).mean()

    def training_record(self) -> dict[str, Any]:
        """How this model was trained, for results and card."""
        return super().training_record() | {"feature": self.args.feature, "token_layer": self.args.token_layer}
