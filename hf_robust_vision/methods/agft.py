"""AGFT: adversarial fine-tuning towards the original's own soft answers, with class names and without labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from hf_robust_vision.attacks import Objective
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.training.base import Batch
from hf_robust_vision.training.config import need_number

from .classes import ClassTrainer
from .drift import DriftArguments, DriftTrainer


@dataclass
class AGFTArguments(DriftArguments):
    """Arguments of `AGFTTrainer`; only the added fields are listed.

    Args:
        student_scale: Scale of the student's logits, over the model's own (the official code's 180 over OpenAI's 100).
        target_ratio: Scale of the target's logits over the student's; less gives a softer target.
        label_weight: Ours: share of the true label in the target, 0 (the paper: labels are not looked at) to 1.
    """

    student_scale: float = field(default=1.8, metadata={"help": "Scale of the student's logits over the model's own."})
    target_ratio: float = field(default=0.4, metadata={"help": "Scale of the target's logits over the student's."})
    label_weight: float = field(default=0.0, metadata={"help": "Share of the true label in the target, 0 to 1."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("student_scale", "target_ratio", "label_weight"):
            need_number(self, name)
        for name, usual in (("student_scale", 1.8), ("target_ratio", 0.4)):
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 makes all classes alike; type --{name} {usual}.")
        if self.label_weight > 1:
            raise ValueError(f"label_weight is a share, at most 1, got {self.label_weight:g}.")


def soft_target(original: Tensor, labels: Tensor, label_weight: float = 0.0) -> Tensor:
    """`(1 - w) softmax(l0(x)) + w onehot(c)`, shape (batch, classes), of the original's logits of the clean images."""
    target = original.softmax(1)
    if label_weight == 0:
        return target
    return (1 - label_weight) * target + label_weight * F.one_hot(labels, target.shape[1]).to(target)


class AGFTTrainer(DriftTrainer, ClassTrainer):
    """Fine-tune the vision tower so that a perturbed image gets the original's soft answer to the clean one.

    Attacker and learner look at the same number, the cross-entropy of `softmax(s cos(phi(x'), T0))` to the target
    `softmax(r s cos(phi0(x), T0))`, with the class embeddings T0 of the original text tower, s the model's own frozen
    scale times `student_scale`, and r the `target_ratio`: sharper than the model's answers the one, softer the other.
    The text tower does not train. With `clean_drift_bound` (ours) clean images are held to the original. With
    `label_weight=1` and `student_scale=1` it is TeCoA.

    Deviation: `label_weight` mixes the true label into the target; the paper has none.

    Reference:
        AGFT, https://huggingface.co/papers/2603.29410; r and s are those of the official code.
    """

    args_class = AGFTArguments
    method: ClassVar[str] = "AGFT"
    tag_names: ClassVar[tuple[str, ...]] = ("agft",)
    paper: ClassVar[str | None] = "2603.29410"

    args: AGFTArguments

    def logits(self, image_embeds: Tensor, texts: Tensor | None = None) -> Tensor:
        """Cosines times the student's scale."""
        return self.args.student_scale * super().logits(image_embeds, texts)

    def target(self, batch: Batch) -> Tensor:
        """What both sides compare with: the original's probabilities of the clean images, and a share of the label."""
        original = self.args.target_ratio * self.logits(batch.original.image_embeds)
        return soft_target(original, batch.labels, self.args.label_weight)

    def attack_objective(self, encoder: Encoder, batch: Batch) -> Objective:
        """Cross-entropy to the target."""
        target = self.target(batch)
        return lambda images: F.cross_entropy(self.logits(encoder(images).image_embeds), target, reduction="none")

    def robust_loss(self, model: nn.Module, batch: Batch, adversarial: Tensor) -> Tensor:
        """The same cross-entropy, averaged over the batch; where the drift is bounded, with that of the clean images."""
        attacked, anchor = self.attacked_and_anchor(model, batch, adversarial)
        return F.cross_entropy(self.logits(attacked.image_embeds), self.target(batch)) + anchor
