"""An attacker who wants to hear a chosen text: judged by what `generate` says, with the clean rate as control."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hf_robust_vision.data.demo import DEMO_NAME, demo_checkpoint
from hf_robust_vision.data.demo_questions import PROMPT, load_questions
from hf_robust_vision.evaluation.results import load_results, save_results
from hf_robust_vision.evaluation.tasks import (
    AnswerLoss,
    RightAnswer,
    VLMProtocol,
    WrongAnswer,
    answer_task,
    evaluate_targeted,
)
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.vlm_inputs import vlm_inputs
from tests.evaluation.journal import begun
from tests.evaluation.tasks.test_vqa import Killed, lines


pytest.importorskip("easy_vqa")
ABOUT = {"prompt": PROMPT, "model_name": "before", "dataset": DEMO_NAME, "split": "test", "progress": False}


@pytest.fixture(scope="module")
def vlm():
    return LlavaForConditionalGeneration.from_pretrained(demo_checkpoint("demo-llava")).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(demo_checkpoint("demo-llava"))


@pytest.fixture(scope="module")
def questions():
    """What colour there is; the answer is never blue."""
    asked = load_questions("test", yes_no=False, limit=60)
    return [question for question in asked if "color" in question.text and question.answer != "blue"][:6]


def generated(vlm, processor, question):
    image = Image.open(question.image).convert("RGB")
    inputs = processor(images=image, text=PROMPT.format(question.text), return_tensors="pt")
    output = vlm.generate(**inputs, do_sample=False, max_new_tokens=6)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_target_is_heard_under_attack_and_not_before(vlm, processor, questions, tmp_path):
    """The clean rate is the control."""
    before = weights_sha256(vlm)
    hows = [
        VLMProtocol((eps,), steps=10, restarts=1, batch_size=4, objectives=("nll",)) for eps in (1 / 255, 64 / 255)
    ]  # two attacks: nothing is carried over
    settings = {**ABOUT, "max_new_tokens": 6, "samples_dir": tmp_path}
    small, large = (evaluate_targeted(vlm, processor, questions, "BLUE", how, **settings)[0] for how in hows)
    assert large.attack_success["clean"] == 0
    assert large.attack_success["attacked"] >= 0.75
    assert small.attack_success["attacked"] < large.attack_success["attacked"]
    assert large.robust_accuracy == pytest.approx(1 - large.attack_success["attacked"])
    assert (large.task, large.metric, large.attacks[0]["target"]) == ("vqa", "targeted_success", "BLUE")
    assert weights_sha256(vlm) == before
    records = [json.loads(line) for line in (tmp_path / large.samples).read_text().splitlines()]
    for record, question in zip(records, questions):
        assert record["clean"] == generated(vlm, processor, question)
        assert ("blue" in record["adversarial"].lower()) == (record["fooled_by"] is not None)
    save_results([small, large], tmp_path)
    assert load_results(tmp_path)[1].attack_success == large.attack_success


def test_what_is_said_anyway_counts_as_control(vlm, processor, questions):
    """Without a perturbation the attacker's rate is the clean one; capitals do not matter."""
    said = [generated(vlm, processor, question) for question in questions]
    target = said[0]
    run = [vlm, processor, questions, target.upper(), VLMProtocol((0.0,))]
    (result,) = evaluate_targeted(*run, **ABOUT, max_new_tokens=6)
    share = sum(target in text for text in said) / len(said)
    assert 0 < share < 1
    assert result.attack_success == pytest.approx({"clean": share, "attacked": share})


def test_wanted_loss_falls_where_the_target_becomes_likely(vlm, processor, questions):
    """The objective is the untargeted one with its sign turned, and success is the opposite of failure."""
    inputs = vlm_inputs(vlm, processor)
    images = torch.stack([question.pixels(inputs) for question in questions])
    prompts = [PROMPT.format(question.text) for question in questions]
    task = answer_task(inputs, prompts, ["red"] * len(questions), (64, 64))
    for kind in ("nll", "margin"):
        wanted = AnswerLoss(task, kind, wanted=True)(images)
        assert torch.equal(wanted, -AnswerLoss(task, kind)(images))
    said = [generated(vlm, processor, question).startswith("red") for question in questions]
    assert RightAnswer(task)(images).tolist() == said
    assert torch.equal(RightAnswer(task)(images), ~WrongAnswer(task)(images))
    assert (wanted > 0).tolist() == said


def test_killed_and_resumed_equals_unbroken(vlm, processor, questions, tmp_path):
    how = VLMProtocol((16 / 255,), steps=2, restarts=1, batch_size=2, objectives=("nll",))
    settings = {**ABOUT, "max_new_tokens": 6}
    run = [vlm, processor]
    (whole,) = evaluate_targeted(*run, questions, "blue", how, **settings, samples_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        broken = [*questions[:2], Killed(questions[2]), *questions[3:]]
        evaluate_targeted(*run, broken, "blue", how, **settings, samples_dir=tmp_path / "broken")
    assert begun(tmp_path / "broken") == {question.id for question in questions[:2]}
    (resumed,) = evaluate_targeted(*run, questions, "blue", how, **settings, samples_dir=tmp_path / "broken")
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    assert resumed.attack_success == whole.attack_success
    evaluate_targeted(*run, questions, "red", how, **settings, samples_dir=tmp_path / "broken")
    assert len(list((tmp_path / "broken").glob("samples-*.jsonl"))) == 2, "another target has records of its own"


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("  ", "the target is empty"),
        ("please reset", r"the tokenizer writes the target 'please reset' as"),
        ("red circle", "has 2 tokens, max_new_tokens is 1"),
    ],
)
def test_targets_that_can_not_be_said_are_refused(vlm, processor, questions, target, message):
    with pytest.raises(ValueError, match=message):
        evaluate_targeted(vlm, processor, questions, target, VLMProtocol((0.1,)), **ABOUT, max_new_tokens=1)
