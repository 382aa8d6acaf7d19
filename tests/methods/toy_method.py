"""A whole method in one file: the squared distance of the pooled embedding to the original's, weighted."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_robust_vision.attacks import squared_l2
from hf_robust_vision.training.base import AdversarialTrainer
from hf_robust_vision.training.config import AdversarialTrainingArguments


@dataclass
class ToyArguments(AdversarialTrainingArguments):
    """One argument of its own."""

    toy_weight: float = field(default=1.0, metadata={"help": "Weight of the loss."})


class ToyTrainer(AdversarialTrainer):
    """Attack and learn the same number."""

    args_class = ToyArguments
    method = "Toy"

    def attack_objective(self, encoder, batch):
        return lambda images: squared_l2(encoder(images).image_embeds, batch.original.image_embeds)

    def robust_loss(self, model, batch, adversarial):
        distance = squared_l2(model(adversarial).image_embeds, batch.original.image_embeds)
        return self.args.toy_weight * distance.mean()
