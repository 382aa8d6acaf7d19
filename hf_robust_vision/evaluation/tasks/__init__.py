"""What is measured under attack, one file a task: classes, retrieval, corruptions, answers, captions, chosen texts."""

from hf_robust_vision.evaluation.task import Task

from .answers import AnswerLoss, RightAnswer, WrongAnswer, answer_task
from .captions import CaptionMetric, Captions, bleu, chrf, evaluate_captions
from .corruptions import Corruptions, evaluate_corruptions
from .retrieval import Retrieval, RetrievalProtocol, evaluate_retrieval, remeasure_retrieval
from .targeted import ChosenText, evaluate_targeted
from .vlm import VLMProtocol
from .vqa import VQA, AnswerExample, attack_example, evaluate_vqa, remeasure_vqa
from .zero_shot import ZeroShot, evaluate_zero_shot, remeasure


# What is known of a record whose model is not at hand, by the `task` of its result; of all others as `Task` says.
TASKS: dict[str, type[Task]] = {kind.task: kind for kind in (ZeroShot, Retrieval, Corruptions)}
