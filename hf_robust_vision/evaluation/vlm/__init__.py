"""Vision-language models under white-box attacks through the whole model: answers, captions, chosen targets."""

from .answers import AnswerLoss, AnswerTask, RightAnswer, WrongAnswer, answer_task
from .captions import CaptionMetric, bleu, chrf, evaluate_captions
from .example import AnswerExample, attack_example
from .flamingo import FlamingoInputs
from .inputs import SingleImageInputs, TiledInputs, VLMInputs, vlm_inputs
from .protocol import VLMProtocol
from .sanity import check_targeted_sanity, check_vqa_sanity
from .targeted import evaluate_targeted
from .vqa import evaluate_vqa, remeasure_vqa


__all__ = [
    "AnswerExample",
    "AnswerLoss",
    "AnswerTask",
    "CaptionMetric",
    "FlamingoInputs",
    "RightAnswer",
    "SingleImageInputs",
    "TiledInputs",
    "VLMInputs",
    "VLMProtocol",
    "WrongAnswer",
    "answer_task",
    "attack_example",
    "bleu",
    "check_targeted_sanity",
    "check_vqa_sanity",
    "chrf",
    "evaluate_captions",
    "evaluate_targeted",
    "evaluate_vqa",
    "remeasure_vqa",
    "vlm_inputs",
]
