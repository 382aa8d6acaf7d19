"""Vision-language models under white-box attacks through the whole model: answers, captions, chosen targets."""

from .answers import AnswerLoss, AnswerTask, RightAnswer, WrongAnswer, answer_task
from .captions import CaptionMetric, bleu, chrf, evaluate_captions
from .example import AnswerExample, attack_example
from .protocol import VLMProtocol
from .targeted import evaluate_targeted
from .vqa import evaluate_vqa, remeasure_vqa


__all__ = [
    "AnswerExample",
    "AnswerLoss",
    "AnswerTask",
    "CaptionMetric",
    "RightAnswer",
    "VLMProtocol",
    "WrongAnswer",
    "answer_task",
    "attack_example",
    "bleu",
    "chrf",
    "evaluate_captions",
    "evaluate_targeted",
    "evaluate_vqa",
    "remeasure_vqa",
]
