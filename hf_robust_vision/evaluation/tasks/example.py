"""One attacked question, for a picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_robust_vision.attacks import make_ball
from hf_robust_vision.towers.clip import attack_mode
from hf_robust_vision.towers.vlm_inputs import vlm_inputs

from .protocol import VLMProtocol
from .run import start_noise
from .vqa import AnotherAnswer, Question


@dataclass(frozen=True)
class AnswerExample:
    """One attacked question, for a picture.

    Args:
        image: In [0, 1], shape (3, height, width).
        adversarial: The same, attacked.
        clean_answer: What the model says about `image`.
        adversarial_answer: What it says about `adversarial`.
        eps: Linf radius of the attack.
    """

    image: Tensor
    adversarial: Tensor
    clean_answer: str
    adversarial_answer: str
    eps: float


def attack_example(
    vlm: nn.Module, processor: Any, question: Question, prompt: str, eps: float, steps: int = 50, restarts: int = 1
) -> AnswerExample:
    """Attack one question by PGD, on the loss of its true answer and, if that answer stands, on its margin.

    Args:
        vlm: The model; left as it was.
        processor: Its processor, or a `VLMInputs` of the model.
        question: What is asked.
        prompt: With "{}" for the question and the processor's image token.
        eps: Linf radius in pixels of [0, 1].
        steps: Of each attack.
        restarts: Random starts of each attack.
    """
    inputs = vlm_inputs(vlm, processor)
    with attack_mode(vlm):
        image = question.pixels(inputs)[None].to(inputs.device)
        goal, row = AnotherAnswer(inputs, prompt, [question], image), torch.tensor([0], device=image.device)
        found = image
        for attack in VLMProtocol((eps,), steps=steps, restarts=restarts).attacks():
            objective, fooled = goal.aim(attack, row)
            found = attack.run(objective, image, make_ball("linf", eps), start_noise(0, attack, [question.id]), fooled)
            if fooled is not None and fooled(found).all():
                break
        clean, attacked = (goal.judge(row, images)[0].text for images in (image, found))
    return AnswerExample(image[0].cpu(), found[0].cpu(), clean, attacked, eps)
