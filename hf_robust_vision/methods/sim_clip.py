"""Sim-CLIP: Siamese adversarial fine-tuning of the vision tower, without labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from hf_robust_vision.attacks import Objective, cosine_distance, squared_l2
from hf_robust_vision.towers.base import EncoderOutput
from hf_robust_vision.towers.load import Encoder
from hf_robust_vision.training.base import Batch
from hf_robust_vision.training.config import need_number, one_of

from .features import FeatureArguments, FeatureDistance, FeatureTrainer, detached


FORMS = ("frozen", "anchored", "paper")
DISTANCES = {"cosine": cosine_distance, "squared_l2": squared_l2}


@dataclass
class SimCLIPArguments(FeatureArguments):
    """Arguments of `SimCLIPTrainer`; only the added fields are listed.

    Args:
        form: "frozen" (default; the official code: the original's clean embedding is the target), "anchored" (the
            paper's loss, held to the original by `anchor_weight`) or "paper" (collapses, see `SimCLIPTrainer`).
        anchor_weight: Strength of the anchor; more keeps clean accuracy, less gives robust accuracy. With
            `clean_drift_bound` it is where the anchored form starts.
        attack_distance: What the attacker raises on the pooled embedding: "cosine" or "squared_l2" (official code).
    """

    form: str = field(default="frozen", metadata={"help": "frozen, anchored or paper."})
    anchor_weight: float = field(default=0.3, metadata={"help": "Strength of the anchor to the original."})
    attack_distance: str = field(default="cosine", metadata={"help": "cosine or squared_l2, on the pooled embedding."})

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("form", self.form, FORMS)
        one_of("attack_distance", self.attack_distance, tuple(DISTANCES))
        need_number(self, "anchor_weight")
        if self.form == "anchored" and self.anchor_weight == 0:
            raise ValueError("anchor_weight=0 is the paper's form, which collapses; type --form paper if you mean it.")


def siamese_loss(distance: FeatureDistance, clean: EncoderOutput, adversarial: EncoderOutput) -> Tensor:
    """Symmetric stop-gradient loss of two views, one value per image.

    `1/2 d(adversarial, sg clean) + 1/2 d(clean, sg adversarial)` with d the `distance`, eq. 4 and 5 of the paper; with
    d = 1 - cosine this is the paper's loss plus 1. If `clean` carries no gradient (the official code's frozen target)
    the second half is constant, and the gradient is one half of that of d.
    """
    # With a symmetric d the stop-gradients halve the gradient and do nothing else: both views still move towards each
    # other. What keeps SimSiam from collapsing is its predictor on one view, which this loss lacks.
    return (distance(adversarial, detached(clean)) + distance(clean, detached(adversarial))) / 2


class SimCLIPTrainer(FeatureTrainer):
    """Fine-tune the vision tower so that a perturbed image keeps the embedding of the clean one.

    The three forms differ in what the adversarial view is drawn to:

    - `paper`: the tuned model's own clean embedding. Nothing ties it to the original space; it was measured to
      collapse to one point while its loss looks excellent, so the run stops with `CollapseError`.
    - `frozen` (default): the original model's clean embedding, as the official code does, in its weighting (the
      gradient is one half of that of the distance). On the demo it was the most robust form for the time spent.
    - `anchored` (ours): the paper's loss plus `anchor_weight` times the distance of the clean embedding to the
      original's; the attack runs against the original's embedding.

    With `clean_drift_bound` each form is held to the original by a weight that is found while training.

    Deviation: by default the attacker raises the cosine distance, the quantity that the loss lowers; the official
    code raises the squared Euclidean distance (`attack_distance="squared_l2"`).

    Reference:
        Sim-CLIP, https://huggingface.co/papers/2407.14971; the forms are compared in docs/methods/sim_clip.md.
    """

    args_class = SimCLIPArguments
    method: ClassVar[str] = "Sim-CLIP"
    tag_names: ClassVar[tuple[str, ...]] = ("sim-clip",)
    paper: ClassVar[str | None] = "2407.14971"
    against_collapse: ClassVar[str] = "--form anchored or frozen, a larger --anchor_weight, or "

    args: SimCLIPArguments

    @property
    def anchor_weight(self) -> float:
        """As `DriftTrainer.anchor_weight`."""
        return self.args.anchor_weight if self.args.form == "anchored" else 0.0

    def attack_objective(self, encoder: Encoder, batch: Batch) -> Objective:
        """Distance to the tuned clean embedding (`paper`) or to the original's (`frozen`, `anchored`)."""
        distance, paper = self.distance_by(DISTANCES[self.args.attack_distance]), self.args.form == "paper"
        target = detached(self.features(encoder, batch.images)) if paper else batch.original
        return lambda images: distance(self.features(encoder, images), target)

    def robust_loss(self, model: nn.Module, batch: Batch, adversarial: Tensor) -> Tensor:
        """The Siamese loss of the chosen form."""
        frozen = self.args.form == "frozen"
        if frozen and not self.holds_clean:
            return siamese_loss(self.distance, batch.original, self.features(model, adversarial)).mean()
        clean, attacked = self.clean_and_attacked(model, batch, adversarial)
        loss = siamese_loss(self.distance, batch.original if frozen else clean, attacked)
        if self.holds_clean:  # the clean view alone: the adversarial one is drawn to it, or to the original, already
            loss = loss + self.anchor(clean, batch)
        return loss.mean()
