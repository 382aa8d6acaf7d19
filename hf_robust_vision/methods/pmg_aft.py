"""PMG-AFT: TeCoA, held to the original model and to the tuned model's own clean answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_robust_vision.training.base import Batch
from hf_robust_vision.training.config import AdversarialTrainingArguments, one_of

from .classes import ClassTrainer, divergence


PROFILES = ("textbook", "code")


@dataclass
class PMGAFTArguments(AdversarialTrainingArguments):
    """Arguments of `PMGAFTTrainer`; only the added fields are listed.

    Args:
        profile: "textbook" (default: the paper's formula as it stands) or "code" (what the official code computes).
    """

    profile: str = field(default="textbook", metadata={"help": "textbook or code."})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("profile", self.profile, PROFILES)


def pmg_aft_loss(
    clean: Tensor, adversarial: Tensor, teacher: Tensor, labels: Tensor, *, profile: str = "textbook"
) -> Tensor:
    """`CE(l(x'), c) + KL(p0(x') || p(x')) + KL(p(x) || p(x'))`, a scalar.

    `clean` and `adversarial` are the tuned model's logits, shape (batch, classes), `teacher` the original's of the
    ADVERSARIAL images; of `profile` see `PMGAFTTrainer`.
    """
    code = profile == "code"
    reduction = "sum" if code else "batchmean"
    # Held fixed, the clean answers draw the adversarial ones; with gradient they come to meet them, and get worse.
    target = clean if code else clean.detach()
    guidance = divergence(teacher.detach(), adversarial, reduction)
    return F.cross_entropy(adversarial, labels) + guidance + divergence(target, adversarial, reduction)


class PMGAFTTrainer(ClassTrainer):
    """Fine-tune the vision tower with TeCoA's attack and loss and two distillation terms.

    The official code differs from the formula in three places that offset each other, so that they are only offered
    together, as profile "code": all logits are bare cosines (the scale of 100 is normalised away, in the attack too),
    the KL terms are sums over the batch, and the clean target is not detached. Its balance therefore depends on the
    batch size of one process. The default is "textbook", whose loss does not.

    Reference:
        PMG-AFT, https://huggingface.co/papers/2401.04350.
    """

    args_class = PMGAFTArguments
    method: ClassVar[str] = "PMG-AFT"
    tag_names: ClassVar[tuple[str, ...]] = ("pmg-aft",)
    paper: ClassVar[str | None] = "2401.04350"

    args: PMGAFTArguments

    def logits(self, image_embeds: Tensor, texts: Tensor | None = None) -> Tensor:
        """Scaled cosines, in profile "code" bare ones."""
        logits = super().logits(image_embeds, texts)
        return logits / self.bank.logit_scale if self.args.profile == "code" else logits

    def robust_loss(self, model: nn.Module, batch: Batch, adversarial: Tensor) -> Tensor:
        """Cross-entropy and both distillation terms, from one forward pass."""
        embeds = model(torch.cat([batch.images, adversarial])).image_embeds
        clean, attacked = self.logits(embeds).chunk(2)
        teacher = self.logits(self.reference(adversarial).image_embeds)
        return pmg_aft_loss(clean, attacked, teacher, batch.labels, profile=self.args.profile)
