"""Attacks on images in [0, 1]. They know an objective and a ball, and nothing of CLIP."""

from .apgd import apgd
from .balls import Ball, L2Ball, LinfBall, check_length, make_ball
from .compiled import CompiledStep
from .fab import fab
from .noise import StartNoise
from .objectives import (
    DLR,
    CrossEntropy,
    EmbeddingDistance,
    Logits,
    Margin,
    Misclassified,
    Objective,
    Success,
    TargetedDLR,
    TargetedMargin,
    cosine_distance,
    squared_l2,
)
from .pgd import fgsm, pgd, pgd_last
from .protocol import PROTOCOLS, Attack, Protocol, classification_objective, get_protocol
from .search import NonFiniteGradientWarning
from .square import square


__all__ = [
    "DLR",
    "PROTOCOLS",
    "Attack",
    "Ball",
    "CompiledStep",
    "CrossEntropy",
    "EmbeddingDistance",
    "L2Ball",
    "LinfBall",
    "Logits",
    "Margin",
    "Misclassified",
    "NonFiniteGradientWarning",
    "Objective",
    "Protocol",
    "StartNoise",
    "Success",
    "TargetedDLR",
    "TargetedMargin",
    "apgd",
    "check_length",
    "classification_objective",
    "cosine_distance",
    "fab",
    "fgsm",
    "get_protocol",
    "make_ball",
    "pgd",
    "pgd_last",
    "square",
    "squared_l2",
]
