"""What `compare.py` compares: the methods, and TIMA with single changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from hf_robust_vision.attacks import Objective
from hf_robust_vision.methods.agft import AGFTTrainer
from hf_robust_vision.methods.fare import FARETrainer
from hf_robust_vision.methods.pmg_aft import PMGAFTTrainer
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.methods.tima import TIMATrainer
from hf_robust_vision.training.base import AdversarialTrainer, Batch


RIVALS = ("tecoa", "pmg-aft")


class CleanTrainer(TeCoATrainer):
    """The control: TeCoA's loss on the clean images, everything else alike."""

    method: ClassVar[str] = "clean fine-tuning"

    def attack(self, objective: Objective, batch: Batch) -> Tensor:
        """No attack at all."""
        return batch.images

    def training_record(self) -> dict[str, Any]:
        """How this model was trained, for results and card."""
        return super().training_record() | {"eps": 0.0, "attack_steps": 0}


TRAINERS: dict[str, type[AdversarialTrainer]] = {
    "control": CleanTrainer,
    "sim-clip": SimCLIPTrainer,
    "fare": FARETrainer,
    "tecoa": TeCoATrainer,
    "pmg-aft": PMGAFTTrainer,
    "agft": AGFTTrainer,
    "tima": TIMATrainer,
}


@dataclass(frozen=True, eq=False)
class Method:
    """One row of a table: a trainer and what is set on it; no trainer is the original model."""

    label: str
    trainer: type[AdversarialTrainer] | None
    options: Mapping[str, Any] = field(default_factory=dict)


METHODS = {
    "undefended": Method("undefended", None),
    "control": Method("control, no attack", CleanTrainer),
    "sim-clip": Method("Sim-CLIP", SimCLIPTrainer, {"form": "frozen"}),
    "sim-clip-anchored": Method("Sim-CLIP, anchored", SimCLIPTrainer, {"form": "anchored"}),
    "sim-clip-paper": Method("Sim-CLIP, paper's form", SimCLIPTrainer, {"form": "paper"}),
    "fare": Method("FARE", FARETrainer),
    "tecoa": Method("TeCoA", TeCoATrainer),
    "agft": Method("AGFT", AGFTTrainer),
    "agft-half-label": Method("AGFT, half the label", AGFTTrainer, {"label_weight": 0.5}),
    "pmg-aft": Method("PMG-AFT", PMGAFTTrainer),
    "pmg-aft-code": Method("PMG-AFT, official code", PMGAFTTrainer, {"profile": "code"}),
    "tima": Method("TIMA", TIMATrainer),
    "tima-v1": Method("TIMA, 2024 form", TIMATrainer, {"variant": "v1"}),
}
ON_REQUEST = ("agft", "agft-half-label")  # newer than the published tables, which a bare command repeats


def tima_with(*settings: tuple[str, dict[str, Any]]) -> dict[str, Method]:
    """TIMA at its defaults and with single changes, beside its rivals."""
    rows = {name: METHODS[name] for name in (*RIVALS, "tima")}
    return rows | {label: Method(label, TIMATrainer, options) for label, options in settings}


ABLATION = tima_with(
    ("no MHE", {"mhe_weight": 0.0}),
    ("no distillation", {"iakd_weight": 0.0}),
    ("text tower frozen", {"text_params": "none"}),
    ("text projection only", {"text_params": "projection"}),
    ("no margin", {"margin": 0.0}),
    ("constant margin", {"margin_mode": "constant"}),
    ("similarity margin", {"margin_mode": "similarity"}),
    ("margin from original texts", {"margin_text": "original"}),
    ("gate per sample", {"gate": "sample"}),
    ("no gate", {"gate": "none"}),
    ("constant margin without gate", {"gate": "none", "margin_mode": "constant"}),
    ("with TAKD", {"takd_weight": 1.0}),
    ("with TAKD on clean images", {"takd_weight": 1.0, "takd_student": "clean"}),
)
SWEEP = tima_with(
    *((f"MHE weight {value:g}", {"mhe_weight": value}) for value in (0.1, 10.0)),
    *((f"distillation weight {value:g}", {"iakd_weight": value}) for value in (0.1, 10.0)),
    *((f"TAKD weight {value:g}", {"takd_weight": value}) for value in (0.1, 1.0)),
    *((f"eta {value:g}", {"eta": value}) for value in (0.3, 0.5)),
    *((f"margin {value:g} without gate", {"gate": "none", "margin": value}) for value in (0.05, 0.1, 0.2, 0.4)),
)
# Where text distances mean something, the margin is shown without the gate that hides part of it, too.
EMOJI_METHODS = METHODS | {"tima-no-gate": Method("TIMA, no gate", TIMATrainer, {"gate": "none"})}
