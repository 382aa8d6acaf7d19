"""Measure, harden and swap the CLIP vision towers of Hugging Face models against adversarial images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that `import hf_robust_vision` costs next to nothing.
_HOME = {
    "AdversarialTrainer": "trainers.base",
    "AdversarialTrainingArguments": "trainers.config",
    "FAREArguments": "trainers.fare",
    "FARETrainer": "trainers.fare",
    "L2Ball": "attacks",
    "LabelledImages": "data.datasets",
    "LinfBall": "attacks",
    "PMGAFTArguments": "trainers.pmg_aft",
    "PMGAFTTrainer": "trainers.pmg_aft",
    "RobustnessProtocol": "evaluation.zero_shot",
    "RobustnessResult": "evaluation.results",
    "SimCLIPArguments": "trainers.sim_clip",
    "SimCLIPTrainer": "trainers.sim_clip",
    "StartNoise": "attacks",
    "TIMAArguments": "trainers.tima",
    "TIMATrainer": "trainers.tima",
    "TeCoAArguments": "trainers.tecoa",
    "TeCoATrainer": "trainers.tecoa",
    "apgd": "attacks",
    "as_encoder": "encoders",
    "evaluate_zero_shot": "evaluation.zero_shot",
    "fgsm": "attacks",
    "get_protocol": "attacks",
    "load_encoder": "encoders",
    "load_labelled_images": "data.datasets",
    "load_results": "evaluation.results",
    "make_text_bank": "text_bank",
    "merge_adapter": "trainers.adapters",
    "pgd": "attacks",
    "swap_vision_encoder": "vlm.swap",
}

__all__ = [
    "AdversarialTrainer",
    "AdversarialTrainingArguments",
    "FAREArguments",
    "FARETrainer",
    "L2Ball",
    "LabelledImages",
    "LinfBall",
    "PMGAFTArguments",
    "PMGAFTTrainer",
    "RobustnessProtocol",
    "RobustnessResult",
    "SimCLIPArguments",
    "SimCLIPTrainer",
    "StartNoise",
    "TIMAArguments",
    "TIMATrainer",
    "TeCoAArguments",
    "TeCoATrainer",
    "apgd",
    "as_encoder",
    "evaluate_zero_shot",
    "fgsm",
    "get_protocol",
    "load_encoder",
    "load_labelled_images",
    "load_results",
    "make_text_bank",
    "merge_adapter",
    "pgd",
    "swap_vision_encoder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if TYPE_CHECKING:
    from .attacks import L2Ball, LinfBall, StartNoise, apgd, fgsm, get_protocol, pgd
    from .data.datasets import LabelledImages, load_labelled_images
    from .encoders import as_encoder, load_encoder
    from .evaluation.results import RobustnessResult, load_results
    from .evaluation.zero_shot import RobustnessProtocol, evaluate_zero_shot
    from .text_bank import make_text_bank
    from .trainers.adapters import merge_adapter
    from .trainers.base import AdversarialTrainer
    from .trainers.config import AdversarialTrainingArguments
    from .trainers.fare import FAREArguments, FARETrainer
    from .trainers.pmg_aft import PMGAFTArguments, PMGAFTTrainer
    from .trainers.sim_clip import SimCLIPArguments, SimCLIPTrainer
    from .trainers.tecoa import TeCoAArguments, TeCoATrainer
    from .trainers.tima import TIMAArguments, TIMATrainer
    from .vlm.swap import swap_vision_encoder
