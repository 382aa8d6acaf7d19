"""What the methods that know class names share: the frozen classifier, and the attack on its cross-entropy."""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor

from hf_robust_vision.attacks import CrossEntropy, Objective
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.towers.clip import Encoder
from hf_robust_vision.training.base import AdversarialTrainer, Batch

from .features import cosines


class ClassTrainer(AdversarialTrainer):
    """Base of the methods that classify by class prompts, those of `train_dataset.class_names`.

    `bank` is the original text tower's classifier; the attacker raises the cross-entropy of `logits`.

    Raises:
        ValueError: If there is no training set, or no text tower and tokenizer to embed its class names.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.train_dataset is None:
            raise ValueError(
                f"{type(self).__name__} takes its class names from train_dataset=LabelledImages; got None."
            )
        self.bank = self.text_bank(cast(LabelledImages, self.train_dataset), self.reference.encoder)

    def logits(self, image_embeds: Tensor, texts: Tensor | None = None) -> Tensor:
        """Cosines times the model's own frozen scale, shape (batch, classes).

        Args:
            image_embeds: Shape (batch, dim), not normalised.
            texts: Class embeddings, shape (classes, dim); by default those of the original text tower.
        """
        return self.bank.logit_scale * cosines(image_embeds, self.bank.embeddings if texts is None else texts)

    def attack_objective(self, encoder: Encoder, batch: Batch) -> Objective:
        """Cross-entropy of the true class."""
        return CrossEntropy(lambda images: self.logits(encoder(images).image_embeds), batch.labels)


def divergence(teacher: Tensor, student: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL(teacher || student) of the distributions that two sets of logits give.

    Args:
        teacher: Logits, shape (batch, classes).
        student: Logits, shape (batch, classes).
        reduction: "batchmean", or "sum" over the batch as well.
    """
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction=reduction, log_target=True)
