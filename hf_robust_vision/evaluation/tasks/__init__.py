"""What is measured under attack, one file a task: classes, retrieval, corruptions, answers, captions, chosen texts."""

from .answers import AnswerLoss, AnswerTask, RightAnswer, WrongAnswer, answer_task
from .captions import CaptionMetric, Captions, bleu, chrf, evaluate_captions
from .corruptions import Corruptions, evaluate_corruptions
from .example import AnswerExample, attack_example
from .retrieval import Retrieval, RetrievalProtocol, evaluate_retrieval, remeasure_retrieval
from .targeted import ChosenText, evaluate_targeted
from .vlm import VLMProtocol
from .vqa import VQA, evaluate_vqa, remeasure_vqa
from .zero_shot import ZeroShot, evaluate_zero_shot, remeasure


__all__ = [
    "VQA",
    "AnswerExample",
    "AnswerLoss",
    "AnswerTask",
    "CaptionMetric",
    "Captions",
    "ChosenText",
    "Corruptions",
    "Retrieval",
    "RetrievalProtocol",
    "RightAnswer",
    "VLMProtocol",
    "WrongAnswer",
    "ZeroShot",
    "answer_task",
    "attack_example",
    "bleu",
    "chrf",
    "evaluate_captions",
    "evaluate_corruptions",
    "evaluate_retrieval",
    "evaluate_targeted",
    "evaluate_vqa",
    "evaluate_zero_shot",
    "remeasure",
    "remeasure_retrieval",
    "remeasure_vqa",
]
