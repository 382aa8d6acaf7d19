"""Measure, harden and swap the vision towers of Hugging Face models against adversarial images."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any


# Where each public name lives: for type checkers, and read by `_homes`.
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
    from .methods.agft import AGFTArguments, AGFTTrainer
    from .methods.fare import FAREArguments, FARETrainer
    from .methods.pmg_aft import PMGAFTArguments, PMGAFTTrainer
    from .methods.sim_clip import SimCLIPArguments, SimCLIPTrainer
    from .methods.tecoa import TeCoAArguments, TeCoATrainer
    from .methods.tima import TIMAArguments, TIMATrainer
    from .report.page import write_report
    from .sanity.check import check_retrieval_sanity, check_sanity
    from .swap.swap import swap_vision_encoder
    from .towers.interpolate import interpolate, interpolate_encoders
    from .towers.load import as_encoder, load_encoder, merge_adapter
    from .towers.text_bank import make_text_bank
    from .training.base import AdversarialTrainer
    from .training.config import AdversarialTrainingArguments

__version__ = "0.1.0"

# Written out once more, because type checkers take no other list for what a package exports.
__all__ = [
    "AGFTArguments", "AGFTTrainer", "AdversarialTrainer", "AdversarialTrainingArguments", "AttackSuccessRate",
    "CaptionedImages", "FAREArguments", "FARETrainer", "ImageSource", "L2Ball", "LabelledImages", "LinfBall",
    "PMGAFTArguments", "PMGAFTTrainer", "RelativeRobustness", "RetrievalProtocol", "RobustAccuracy",
    "RobustnessProtocol", "RobustnessResult", "SimCLIPArguments", "SimCLIPTrainer", "StartNoise", "TIMAArguments",
    "TIMATrainer", "TeCoAArguments", "TeCoATrainer", "apgd", "as_encoder", "check_retrieval_sanity", "check_sanity",
    "evaluate_corruptions", "evaluate_retrieval", "evaluate_zero_shot", "fab", "fgsm", "get_protocol", "interpolate",
    "interpolate_encoders", "load_encoder", "load_labelled_images", "load_results", "load_robust_encoder",
    "make_text_bank", "merge_adapter", "pgd", "push_robust_encoder", "remeasure", "remeasure_retrieval", "square",
    "swap_vision_encoder", "write_report",
]  # fmt: skip


@cache
def _homes() -> dict[str, str]:
    """Public name to its module, as the imports above say."""
    # Nothing is imported before it is used, so that `import hf_robust_vision` costs next to nothing.
    import ast

    source = ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    local = [node for node in source if isinstance(node, ast.ImportFrom) and node.level]
    return {alias.name: f"{__name__}.{node.module}" for node in local for alias in node.names}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_homes()[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
