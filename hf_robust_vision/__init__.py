"""Measure, harden and swap the CLIP vision towers of Hugging Face models against adversarial images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that `import hf_robust_vision` costs next to nothing.
_HOME = {
    "AdversarialTrainer": "trainers.base",
    "AdversarialTrainingArguments": "trainers.config",
    "AttackSuccessRate": "evaluation.metrics",
    "CaptionedImages": "data.captions",
    "FAREArguments": "trainers.fare",
    "FARETrainer": "trainers.fare",
    "L2Ball": "attacks",
    "LabelledImages": "data.datasets",
    "LinfBall": "attacks",
    "PMGAFTArguments": "trainers.pmg_aft",
    "PMGAFTTrainer": "trainers.pmg_aft",
    "RelativeRobustness": "evaluation.metrics",
    "RetrievalProtocol": "evaluation.retrieval",
    "RobustAccuracy": "evaluation.metrics",
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
    "check_retrieval_sanity": "evaluation.retrieval_sanity",
    "check_sanity": "evaluation.sanity",
    "evaluate_corruptions": "evaluation.corruptions",
    "evaluate_retrieval": "evaluation.retrieval",
    "evaluate_zero_shot": "evaluation.zero_shot",
    "fab": "attacks",
    "fgsm": "attacks",
    "get_protocol": "attacks",
    "load_encoder": "encoders",
    "load_labelled_images": "data.datasets",
    "load_results": "evaluation.results",
    "load_robust_encoder": "hub.load",
    "make_text_bank": "text_bank",
    "merge_adapter": "trainers.adapters",
    "pgd": "attacks",
    "push_robust_encoder": "hub.push",
    "remeasure": "evaluation.adversarial",
    "remeasure_retrieval": "evaluation.retrieval",
    "square": "attacks",
    "swap_vision_encoder": "vlm.swap",
    "write_report": "evaluation.page",
}

__all__ = [
    "AdversarialTrainer",
    "AdversarialTrainingArguments",
    "AttackSuccessRate",
    "CaptionedImages",
    "FAREArguments",
    "FARETrainer",
    "L2Ball",
    "LabelledImages",
    "LinfBall",
    "PMGAFTArguments",
    "PMGAFTTrainer",
    "RelativeRobustness",
    "RetrievalProtocol",
    "RobustAccuracy",
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
    "check_retrieval_sanity",
    "check_sanity",
    "evaluate_corruptions",
    "evaluate_retrieval",
    "evaluate_zero_shot",
    "fab",
    "fgsm",
    "get_protocol",
    "load_encoder",
    "load_labelled_images",
    "load_results",
    "load_robust_encoder",
    "make_text_bank",
    "merge_adapter",
    "pgd",
    "push_robust_encoder",
    "remeasure",
    "remeasure_retrieval",
    "square",
    "swap_vision_encoder",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


if TYPE_CHECKING:
    from .attacks import L2Ball, LinfBall, StartNoise, apgd, fab, fgsm, get_protocol, pgd, square
    from .data.captions import CaptionedImages
    from .data.datasets import LabelledImages, load_labelled_images
    from .encoders import as_encoder, load_encoder
    from .evaluation.adversarial import remeasure
    from .evaluation.corruptions import evaluate_corruptions
    from .evaluation.metrics import AttackSuccessRate, RelativeRobustness, RobustAccuracy
    from .evaluation.page import write_report
    from .evaluation.results import RobustnessResult, load_results
    from .evaluation.retrieval import RetrievalProtocol, evaluate_retrieval, remeasure_retrieval
    from .evaluation.retrieval_sanity import check_retrieval_sanity
    from .evaluation.sanity import check_sanity
    from .evaluation.zero_shot import RobustnessProtocol, evaluate_zero_shot
    from .hub.load import load_robust_encoder
    from .hub.push import push_robust_encoder
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
