"""What the methods that know class names share: the frozen classifier, and the attack on its cross-entropy."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_robust_vision.attacks import CrossEntropy, Objective
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.training.base import AdversarialTrainer, Batch


class ClassTrainer(AdversarialTrainer):
    """Base of the methods that classify by class prompts, those of `train_dataset.class_names`.

    `bank` is the original text tower's classifier; the attacker raises the cross-entropy of `logits`.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.train_dataset is None:
            raise ValueError(
                f"{type(self).__name__} takes its class names from train_dataset=LabelledImages; got None."
            )
        self.bank = self.text_bank(cast(LabelledImages, self.train_dataset), self.reference.encoder)

    def logits(self, image_embeds: Tensor, texts: Tensor | None = None) -> Tensor:
        """Cosines times the model's own frozen scale, shape (batch, classes); by default with the original's texts.

        Deviation: SigLIP's own loss is a sigmoid for each pair. The losses over classes stay softmaxes, as published
        for CLIP; a softmax does not depend on SigLIP's bias, which is left out.
        """
        # A scale that trains could lower the cross-entropy by itself, with no image any closer to its class.
        return self.bank.logit_scale * cosines(image_embeds, self.bank.embeddings if texts is None else texts)

    def attack_objective(self, encoder: Encoder, batch: Batch) -> Objective:
        """Cross-entropy of the true class."""
        return CrossEntropy(lambda images: self.logits(encoder(images).image_embeds), batch.labels)


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of every row of one tensor with every row of another, shape (rows, columns), in float32 at least."""
    wide = first.to(torch.promote_types(first.dtype, torch.float32))
    # Autocast would round the product to bfloat16; times a scale of 100 that is an error of a tenth in a logit.
    with torch.autocast(wide.device.type, enabled=False):
        return F.normalize(wide, dim=-1) @ F.normalize(second.to(wide), dim=-1).T


def divergence(teacher: Tensor, student: Tensor, reduction: str = "batchmean") -> Tensor:
    """KL(teacher || student) of two sets of logits, averaged over the batch or, with "sum", added up over it."""
    return F.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction=reduction, log_target=True)
