"""TeCoA: text-guided contrastive adversarial fine-tuning of the vision tower, with labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hf_robust_vision.training.base import Batch
from hf_robust_vision.training.config import AdversarialTrainingArguments

from .classes import ClassTrainer


@dataclass
class TeCoAArguments(AdversarialTrainingArguments):
    """Arguments of `TeCoATrainer`: those of every adversarial trainer."""


class TeCoATrainer(ClassTrainer):
    """Fine-tune the vision tower so that a perturbed image keeps its class among the original's class prompts.

    Attacker and learner look at the same number, `CE(scale * cos(phi(x'), T0), c)`, with the class embeddings T0 of
    the original text tower and the model's own frozen `scale`. The text tower does not train.

    Reference:
        TeCoA, https://huggingface.co/papers/2212.07016.
    """

    args_class = TeCoAArguments
    method: ClassVar[str] = "TeCoA"
    tag_names: ClassVar[tuple[str, ...]] = ("tecoa",)
    paper: ClassVar[str | None] = "2212.07016"

    def robust_loss(self, model: nn.Module, batch: Batch, adversarial: Tensor) -> Tensor:
        """Cross-entropy on the adversarial images."""
        return F.cross_entropy(self.logits(model(adversarial).image_embeds), batch.labels)
