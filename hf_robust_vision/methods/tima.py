"""TIMA: text and image towers fine-tuned together, each aware of the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_robust_vision.attacks import CrossEntropy, Objective
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.towers.base import Reads
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.towers.text_bank import class_embeddings, class_prompts
from hf_robust_vision.training.base import Batch
from hf_robust_vision.training.config import AdversarialTrainingArguments, need_number, one_of
from hf_robust_vision.training.shares import all_rows, my_rows

from .classes import ClassTrainer, cosines, divergence


CHOICES = {
    "variant": ("aaai", "v1"),
    "margin_mode": ("distance", "similarity", "constant"),
    "margin_text": ("tuned", "original"),
    "gate": ("class", "sample", "none"),
    "takd_student": ("adversarial", "clean"),
    "text_params": ("encoder", "projection", "none"),
}
WEIGHTS = ("mhe_weight", "iakd_weight", "takd_weight")


@dataclass
class TIMAArguments(AdversarialTrainingArguments):
    """Arguments of `TIMATrainer`; listed are the added fields of which there is more to say than their help.

    Args:
        variant: "aaai" (AAAI-26) or "v1" (2024): what `gate` and `takd_weight` are where they are not given.
        margin_mode: "distance" (default: the gap grows as two class texts lie further apart), "similarity" (the gap
            grows as they come closer) or "constant".
        margin_text: Text distances from the "tuned" embeddings, without gradient, or from the "original" ones.
        gate: Where the margin applies: "class" (default of "aaai": to classes that the original model finds nearly as
            close to the clean image as the true one), "sample" (to all classes of images that the original model is
            unsure of) or "none" (default of "v1": everywhere).
        takd_student: Image whose prediction the image tower's distillation draws to the original's clean one.
        text_params: What of the text tower trains: "encoder" (all of it, the default), "projection" or "none" (the
            default with `use_peft`; an adapter reaches the text tower only where this asks for it).
        prompts_at_once: Prompts that the text tower keeps for its backward pass; of more it computes each part anew there,
            a third more work on text for the memory of one part. 0 keeps all. Of several processes each embeds the prompts
            of its share of the classes.
    """

    variant: str = field(default="aaai", metadata={"help": "aaai (2026) or v1 (2024)."})
    margin: float = field(default=0.1, metadata={"help": "Margin m on the scale of the cosine."})
    margin_mode: str = field(default="distance", metadata={"help": "distance, similarity or constant."})
    margin_text: str = field(default="tuned", metadata={"help": "Text distances: tuned or original."})
    gate: str | None = field(default=None, metadata={"help": "class, sample or none; default class (v1: none)."})
    eta: float = field(default=0.95, metadata={"help": "Threshold of the gate."})
    mhe_weight: float = field(default=1.0, metadata={"help": "Weight of the hyperspherical energy."})
    iakd_weight: float = field(default=1.0, metadata={"help": "Weight of the text tower's distillation."})
    takd_weight: float | None = field(
        default=None, metadata={"help": "Weight of the image tower's distillation; default 0 (v1: 1)."}
    )
    takd_student: str = field(default="adversarial", metadata={"help": "adversarial or clean."})
    text_params: str | None = field(
        default=None, metadata={"help": "encoder, projection or none; default encoder (use_peft: none)."}
    )

    prompts_at_once: int = field(default=256, metadata={"help": "Prompts that the text tower keeps at once; 0: all."})

    def __post_init__(self) -> None:
        super().__post_init__()
        need_number(self, "prompts_at_once", whole=True)
        if self.gate is None:
            self.gate = "none" if self.variant == "v1" else "class"
        if self.takd_weight is None:
            self.takd_weight = 1.0 if self.variant == "v1" else 0.0
        if self.text_params is None:
            self.text_params = "none" if self.use_peft else "encoder"
        for name, choices in CHOICES.items():
            one_of(name, getattr(self, name), choices)
        for name in ("margin", "eta", *WEIGHTS):
            need_number(self, name)


def hyperspherical_energy(texts: Tensor) -> Tensor:
    """Minimum-hyperspherical-energy loss (MHE) of unit class embeddings: mean over pairs of `1 / (1 + ||t_j - t_k||^2)`."""
    # On the unit sphere the squared distance is 2 - 2 cos; the "1 +" bounds the gradient where two texts coincide.
    energy = 1 / (3 - 2 * cosines(texts, texts))
    others = ~torch.eye(len(texts), dtype=torch.bool, device=texts.device)
    return energy[others].mean()


def required_gap(texts: Tensor, labels: Tensor, *, margin: float, mode: str = "distance") -> Tensor:
    """How much closer than class k an image should lie to its own class, shape (batch, classes), without gradient.

    With s the cosine of the two class texts and m the margin, "distance" is `m (1 - s)`, "similarity" `m max(s, 0)`,
    "constant" `m`. What stands at the true class is cut off by the gate.
    """
    # Without gradient: cross-entropy falls with the gap, so the texts would learn to move together.
    similarity = cosines(texts, texts).detach()[labels]
    gaps = {"distance": 1 - similarity, "similarity": similarity.clamp_min(0), "constant": torch.ones_like(similarity)}
    return margin * gaps[mode]


def confusable(original: Tensor, labels: Tensor, *, eta: float, scale: float, gate: str = "class") -> Tensor:
    """The gate: for which images and classes the margin applies, flags of shape (batch, classes).

    `original` are the cosines of the clean images and the class texts, both of the original model, which `scale` turns
    into logits. At "class" the class's cosine is below the true one by at most `1 - eta` of the latter's size; at "sample"
    the original gives the true class a probability below `eta`; at "none" everywhere. Never for the true class itself.
    """
    true = labels[:, None]
    if gate == "class":
        cosine = original.gather(1, true)
        # Below, also where the true cosine is negative and `eta` times it would lie above.
        applies = original >= cosine - (1 - eta) * cosine.abs()
    elif gate == "sample":
        applies = ((scale * original).softmax(1).gather(1, true) < eta).expand_as(original)
    else:
        applies = torch.ones_like(original, dtype=torch.bool)
    return applies.scatter(1, true, False)


class TIMATrainer(ClassTrainer):
    """Fine-tune both towers: the text tower spreads the classes, the image tower keeps a margin that depends on them.

    With z' the embedding of the adversarial image, z0 the original's of the clean one, T the tuned and T0 the original
    class embeddings and `scale` the model's own frozen logit scale:

    - margin (TAM, ASAM): `CE(scale * (cos(z', t_k) + gate_k * gap_k), c)`, see `required_gap` and `confusable`;
    - MHE: `hyperspherical_energy(T)`;
    - IAKD (SC-MHE's regulariser): `KL(softmax(scale cos(z0, T0)) || softmax(scale cos(z0, T)))`, which reaches the
      text tower only;
    - TAKD: `KL(softmax(scale cos(z0, T)) || softmax(scale cos(z, T)))` with T held fixed, which reaches the image
      tower only.

    Their weighted sum is minimised in one stage, with the class prompts encoded anew at every step. The attacker raises
    the cross-entropy without margin. With `margin=0`, all weights 0 and `text_params="none"` it is TeCoA.

    No public code exists and we did not read the full texts: docs/methods/tima.md says line by line which of this the
    papers state and which is our reading.

    Reference:
        TIMA, https://huggingface.co/papers/2405.17678 (2024), https://doi.org/10.1609/aaai.v40i29.39603 (AAAI-26).
    """

    args_class = TIMAArguments
    method: ClassVar[str] = "TIMA"
    tag_names: ClassVar[tuple[str, ...]] = ("tima",)
    paper: ClassVar[str | None] = "2405.17678"

    args: TIMAArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        templates = get_templates(self.args.templates)
        tokenizer = getattr(self.processing_class, "tokenizer", None)
        # Tokenized together and shared out then, so that a prompt is padded as it is in one process.
        prompts = class_prompts(self.bank.class_names, templates)
        self.accelerator.unwrap_model(self.model).prompts_at_once = self.args.prompts_at_once
        tokens = self.reference.encoder.tokenize(tokenizer, prompts, self.args.device)
        rows = torch.arange(len(prompts)).view(-1, len(templates))[my_rows(len(self.bank.class_names))].flatten()
        self.prompts = {name: value[rows.to(value.device)] for name, value in tokens.items()}

    @classmethod
    def reads(cls, args: Any) -> Reads:
        """The pooled embedding, and of the text tower what is to train."""
        return Reads(text=args.text_params)

    def attack_objective(self, encoder: Encoder, batch: Batch) -> Objective:
        """Cross-entropy of the true class among the tuned class texts, which stay fixed during the attack."""
        with torch.no_grad():
            texts = self._classes(encoder(prompts=self.prompts).text_embeds)
        return CrossEntropy(lambda images: self.logits(encoder(images).image_embeds, texts), batch.labels)

    def robust_loss(self, model: nn.Module, batch: Batch, adversarial: Tensor) -> Tensor:
        """The weighted sum of the four terms, from one forward pass of both towers."""
        args = self.args
        # A second view that no weighted term reads would double the cost of the step.
        needs_clean = bool(args.takd_weight) and args.takd_student == "clean"
        output = model(torch.cat([adversarial, batch.images]) if needs_clean else adversarial, prompts=self.prompts)
        texts = self._classes(output.text_embeds)
        # One tower a distillation: `original` carries no gradient to the images, `fixed` none to the texts. Otherwise
        # each could be satisfied by the other tower's move.
        original, fixed = batch.original.image_embeds, texts.detach()
        attacked, student = output.image_embeds[: len(adversarial)], output.image_embeds[-len(adversarial) :]
        # Unweighted, and logged where the weight is 0 as well: what a weight would do can be seen before it is typed.
        terms: dict[str, tuple[float | None, Tensor]] = {
            "margin": (1.0, self._margin_loss(attacked, texts, batch)),
            "mhe": (args.mhe_weight, hyperspherical_energy(texts)),
            "iakd": (args.iakd_weight, divergence(self.logits(original), self.logits(original, texts))),
        }
        if needs_clean or args.takd_student == "adversarial":  # else nobody has encoded the student's image
            distance = divergence(self.logits(original, fixed), self.logits(student, fixed))
            terms["takd"] = (float(args.takd_weight or 0), distance)
        for name, (_, value) in terms.items():
            self.record(f"loss_{name}", value)
        return torch.stack([weight * value for weight, value in terms.values() if weight]).sum()

    def _margin_loss(self, embeds: Tensor, texts: Tensor, batch: Batch) -> Tensor:
        args, scale = self.args, self.bank.logit_scale
        seen_by_original = cosines(batch.original.image_embeds, self.bank.embeddings)
        applies = confusable(seen_by_original, batch.labels, eta=args.eta, scale=scale, gate=str(args.gate))
        spread = texts if args.margin_text == "tuned" else self.bank.embeddings.to(texts)
        gap = required_gap(spread, batch.labels, margin=args.margin, mode=args.margin_mode)
        self.record("gate_open", applies.sum(1) / (len(texts) - 1))
        return F.cross_entropy(self.logits(embeds, texts) + scale * applies * gap, batch.labels)

    def _classes(self, text_embeds: Tensor) -> Tensor:
        # By class, once its prompts have been averaged: a gather of every prompt would be as many times as large.
        mine = class_embeddings(text_embeds, len(self.bank.templates))
        return all_rows(mine, len(self.bank.class_names))
