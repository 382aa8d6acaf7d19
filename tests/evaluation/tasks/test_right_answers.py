"""When an answer is right: the whole of what `generate` says, whatever the tokens; the attack has to change just that."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_robust_vision.evaluation.task import Batch, Verdict
from hf_robust_vision.evaluation.tasks import VLMProtocol, WrongAnswer, evaluate_vqa
from hf_robust_vision.evaluation.tasks.answers import say
from hf_robust_vision.evaluation.tasks.vqa import VQA, plain
from hf_robust_vision.towers.vlm_inputs import vlm_inputs
from tests.swap.tiny_vlms import SIZE, VOCAB
from tests.towers.tiny_processors import PROMPT, Asked, make_processor, make_speaker


@pytest.fixture(scope="module")
def inputs():
    return vlm_inputs(make_speaker("llava"), make_processor("llava"))


def answers(inputs, question, count):
    """The first words that the model says, one text for each length."""
    prompts = inputs.encode([PROMPT.format(question.text)], (SIZE, SIZE))
    words = say(inputs, prompts, question.pixels(inputs)[None], count)[0].split()
    return [" ".join(words[: place + 1]) for place in range(count)]


def asked(inputs, question):
    """The task of one question, and the question as a batch that the model has answered."""
    task, image = VQA(inputs.vlm, inputs, [question], PROMPT, "noise", "test"), question.pixels(inputs)[None]
    batch = Batch((0,), image)
    with torch.no_grad():
        return task, replace(batch, clean=tuple(task.judge(batch, image)))


def teacher_forced(task, batch):
    """Does greedy decoding leave the true answer?"""
    return WrongAnswer(task.answers(batch, [task.label(0)]))(batch.images).item()


def test_an_answer_that_goes_on_is_another(inputs):
    """Its first word is the true answer, and the words of teacher forcing agree."""
    question = Asked(0)
    task, batch = asked(inputs, replace(question, answer=answers(inputs, question, 3)[0]))
    (verdict,) = batch.clean
    assert not teacher_forced(task, batch)
    assert verdict.lost
    assert len(verdict.answer.split()) == 5, "four tokens more than the answer"


def test_right_in_one_word_is_what_teacher_forcing_says(inputs, monkeypatch):
    monkeypatch.setattr(inputs.vlm.generation_config, "eos_token_id", list(range(VOCAB)))
    for place in range(4):
        question = Asked(place)
        said = answers(inputs, question, 1)[0]
        for answer in (said, "w7" if said != "w7" else "w8"):
            task, batch = asked(inputs, replace(question, answer=answer))
            assert batch.clean[0].lost == teacher_forced(task, batch)


def test_other_tokens_of_the_same_answer_are_right_and_attacked(inputs, monkeypatch):
    """The true answer in capitals has other tokens: it must neither count as fooled nor be out of the attack's reach."""
    monkeypatch.setattr(inputs.vlm.generation_config, "eos_token_id", list(range(VOCAB)))
    bare = [Asked(place) for place in range(3)]
    shouted = [replace(question, answer=f"{answers(inputs, question, 1)[0]}.".upper()) for question in bare]
    how = VLMProtocol((0.001, 0.9), steps=10, restarts=2)
    about = {"model_name": "before", "dataset": "noise", "split": "test", "progress": False}
    small, large = evaluate_vqa(inputs.vlm, inputs, shouted, how, prompt=PROMPT, **about)
    assert small.clean_accuracy == 1
    assert small.robust_accuracy > large.robust_accuracy


def test_attack_does_not_stop_at_the_same_answer_in_other_tokens(inputs):
    """Teacher forcing flags the true answer in capitals, `generate` does not confirm it."""
    question = Asked(0)
    words = answers(inputs, question, 5)[-1]
    task, batch = asked(inputs, replace(question, answer="w1"))
    task.samples = [replace(question, answer=words.upper())]
    stage = task.levels(VLMProtocol((0.1,), objectives=("nll",)).robustness())[0].stages[0]
    _, fooled = task.aim(stage, replace(batch, clean=(Verdict("w1", False, 0.0),)))
    assert fooled.left(batch.images).item()
    assert not fooled(batch.images).item()
    task.samples = [question]
    assert fooled.take(torch.tensor([0]))(batch.images).item()


def test_plain_keeps_what_tells_answers_apart():
    assert plain(" Yes. ") == plain("yes") == "yes"
    assert plain("a  Red\ncircle!") == "a red circle"
    assert plain("-5") != plain("5")
    assert plain("25") != plain("2")
    assert plain("3.5") != plain("35")
    assert plain("?") != plain("!")
