"""Measure, harden and swap the CLIP vision towers of Hugging Face models against adversarial images."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

# Public name -> module. Loaded on first use, so that `import hf_robust_vision` costs next to nothing.
_HOME = {
    "AdversarialTrainer": "training.base",
    "AdversarialTrainingArguments": "training.config",
    "AttackSuccessRate": "evaluation.metrics",
    "CaptionedImages": "data.captions",
    "FAREArguments": "methods.fare",
    "FARETrainer": "methods.fare",
    "ImageSource": "data.sources",
    "L2Ball": "attacks",
    "LabelledImages": "data.datasets",
    "LinfBall": "attacks",
    "PMGAFTArguments": "methods.pmg_aft",
    "PMGAFTTrainer": "methods.pmg_aft",
    "RelativeRobustness": "evaluation.metrics",
    "RetrievalProtocol": "evaluation.tasks.retrieval",
    "RobustAccuracy": "evaluation.metrics",
    "RobustnessProtocol": "evaluation.task",
    "RobustnessResult": "evaluation.results",
    "SimCLIPArguments": "methods.sim_clip",
    "SimCLIPTrainer": "methods.sim_clip",
    "StartNoise": "attacks",
    "TIMAArguments": "methods.tima",
    "TIMATrainer": "methods.tima",
    "TeCoAArguments": "methods.tecoa",
    "TeCoATrainer": "methods.tecoa",
    "apgd": "attacks",
    "as_encoder": "towers.load",
    "check_retrieval_sanity": "sanity.check",
    "check_sanity": "sanity.check",
    "evaluate_corruptions": "evaluation.tasks.corruptions",
    "evaluate_retrieval": "evaluation.tasks.retrieval",
    "evaluate_zero_shot": "evaluation.tasks.zero_shot",
    "fab": "attacks",
    "fgsm": "attacks",
    "get_protocol": "attacks",
    "load_encoder": "towers.load",
    "load_labelled_images": "data.sources",
    "load_results": "evaluation.results",
    "load_robust_encoder": "hub.load",
    "make_text_bank": "towers.text_bank",
    "merge_adapter": "towers.load",
    "pgd": "attacks",
    "push_robust_encoder": "hub.push",
    "remeasure": "evaluation.tasks.zero_shot",
    "remeasure_retrieval": "evaluation.tasks.retrieval",
    "square": "attacks",
    "swap_vision_encoder": "swap.swap",
    "write_report": "report.page",
}

__all__ = [
    "AdversarialTrainer",
    "AdversarialTrainingArguments",
    "AttackSuccessRate",
    "CaptionedImages",
    "FAREArguments",
    "FARETrainer",
    "ImageSource",
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
    from .data.datasets import LabelledImages
    from .data.sources import ImageSource, load_labelled_images
    from .evaluation.metrics import AttackSuccessRate, RelativeRobustness, RobustAccuracy
    from .evaluation.results import RobustnessResult, load_results
    from .evaluation.task import RobustnessProtocol
    from .evaluation.tasks.corruptions import evaluate_corruptions
    from .evaluation.tasks.retrieval import RetrievalProtocol, evaluate_retrieval, remeasure_retrieval
    from .evaluation.tasks.zero_shot import evaluate_zero_shot, remeasure
    from .hub.load import load_robust_encoder
    from .hub.push import push_robust_encoder
    from .methods.fare import FAREArguments, FARETrainer
    from .methods.pmg_aft import PMGAFTArguments, PMGAFTTrainer
    from .methods.sim_clip import SimCLIPArguments, SimCLIPTrainer
    from .methods.tecoa import TeCoAArguments, TeCoATrainer
    from .methods.tima import TIMAArguments, TIMATrainer
    from .report.page import write_report
    from .sanity.check import check_retrieval_sanity, check_sanity
    from .swap.swap import swap_vision_encoder
    from .towers.load import as_encoder, load_encoder, merge_adapter
    from .towers.text_bank import make_text_bank
    from .training.base import AdversarialTrainer
    from .training.config import AdversarialTrainingArguments
