"""One attacked question, for a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_robust_vision.evaluation.task import Batch
from hf_robust_vision.towers.base import attack_mode

from .vlm import VLMProtocol
from .vqa import VQA, Question


@dataclass(frozen=True)
class AnswerExample:
    """An image in [0, 1], shape (3, height, width), the same attacked in a Linf ball, and what is said about each."""

    image: Tensor
    adversarial: Tensor
    clean_answer: str
    adversarial_answer: str
    eps: float


def attack_example(vlm: nn.Module, processor: Any, question: Question, prompt: str, how: VLMProtocol) -> AnswerExample:
    """Attack one question at the largest radius, with one attack after the other until its answer falls."""
    task = VQA(vlm, processor, [question], prompt, dataset="", split="")
    level = task.levels(how.robustness())[-1]
    with torch.no_grad(), attack_mode(vlm):
        image = task.load(0)[None].to(task.weight.device)
        clean = task.judge(Batch((0,), image), image)
        found, said = image, clean
        for stage in level.stages:
            batch = Batch((0,), image, tuple(clean))
            found = task.strike(stage, batch, how.seed)
            said = task.judge(batch, found)
            if said[0].lost:
                break
    return AnswerExample(image[0].cpu(), found[0].cpu(), str(clean[0].answer), str(said[0].answer), level.value)
