"""The shipped LLaVA under attack: the criterion is what `generate` would say, and the attack is a real one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from hf_robust_vision.attacks import LinfBall, StartNoise, pgd
from hf_robust_vision.data.demo import DEMO_NAME, demo_checkpoint
from hf_robust_vision.data.demo_questions import PROMPT, load_questions
from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.tasks import (
    AnswerLoss,
    VLMProtocol,
    WrongAnswer,
    answer_task,
    attack_example,
    evaluate_vqa,
    remeasure_vqa,
)
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.vlm_inputs import vlm_inputs
from tests.evaluation.journal import begun


pytest.importorskip("easy_vqa")


@pytest.fixture(scope="module")
def vlm():
    return LlavaForConditionalGeneration.from_pretrained(demo_checkpoint("demo-llava")).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(demo_checkpoint("demo-llava"))


@pytest.fixture(scope="module")
def questions():
    return load_questions("test", yes_no=False, limit=12)


@pytest.fixture
def task(vlm, processor, questions):
    return make_task(vlm, processor, questions)


def make_task(vlm, processor, questions):
    prompts, answers = [PROMPT.format(q.text) for q in questions], [q.answer for q in questions]
    return answer_task(vlm_inputs(vlm, processor), prompts, answers, (64, 64))


def batch(task, questions):
    return torch.stack([question.pixels(task.inputs) for question in questions])


class Killed:
    """A question at whose image the process dies."""

    def __init__(self, question):
        self.id, self.text, self.answer = question.id, question.text, question.answer
        self.fingerprint = question.fingerprint

    def pixels(self, transform):
        raise KeyboardInterrupt


def lines(folder):
    (file,) = folder.glob("samples-*.jsonl")
    return file.read_text().splitlines()


def measure(vlm, processor, questions, how, **settings):
    shared = {"prompt": PROMPT, "model_name": "before", "dataset": DEMO_NAME, "split": "test", "progress": False}
    return evaluate_vqa(vlm, processor, questions, how, **shared, **settings)


def test_splits_share_no_image():
    images = [{q.image for q in load_questions(split)} for split in ("train", "validation", "test")]
    assert all(images)
    assert not images[0] & images[1]
    assert not images[2] & (images[0] | images[1])


def test_right_answer_is_what_generate_says(vlm, processor, questions, task):
    """Half of the answers are made wrong; teacher forcing must flag exactly those that `generate` does not give."""
    asked = [replace(q, answer="circle") if place % 2 else q for place, q in enumerate(questions)]
    flags = WrongAnswer(make_task(vlm, processor, asked))(batch(task, questions))
    said = []
    for question in questions:
        inputs = processor(
            images=Image.open(question.image).convert("RGB"), text=PROMPT.format(question.text), return_tensors="pt"
        )
        output = vlm.generate(**inputs, do_sample=False, max_new_tokens=1)
        said.append(processor.tokenizer.decode(output[0, -1:]).strip())
    assert flags.tolist() == [answer != question.answer for answer, question in zip(said, asked)]
    assert 0 < sum(flags.tolist()) < len(asked)


def test_margin_is_positive_exactly_where_the_answer_is_wrong(task, questions):
    images = batch(task, questions)
    noisy = (images + 0.4 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    wrong = WrongAnswer(task)(noisy)
    assert 0 < wrong.sum() < len(wrong), "the noise must change some answers, not all"
    assert torch.equal(AnswerLoss(task, "margin")(noisy) > 0, wrong)


def test_loss_and_success_share_one_forward_pass_also_after_take(task, questions):
    calls = 0
    model = task.inputs.vlm
    forward = model.forward

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return forward(*args, **kwargs)

    model.forward = counted
    try:
        rows = torch.tensor([0, 3])
        loss, success = AnswerLoss(task).take(rows), WrongAnswer(task).take(rows)
        images = batch(task, questions)[rows].requires_grad_(True)
        loss(images)
        success(images)
    finally:
        del model.forward
    assert calls == 1


def test_attack_breaks_answers_more_at_larger_eps_and_leaves_no_trace(vlm, processor, questions):
    before = weights_sha256(vlm)
    hows = [VLMProtocol((eps,), steps=10, restarts=1, batch_size=6) for eps in (4 / 255, 64 / 255)]
    small, large = (measure(vlm, processor, questions, how)[0] for how in hows)  # two attacks: nothing is carried over
    assert small.clean_accuracy >= 0.9
    assert large.robust_accuracy <= 0.25
    assert small.robust_accuracy > large.robust_accuracy
    assert weights_sha256(vlm) == before
    assert all(parameter.grad is None for parameter in vlm.parameters())


def test_more_steps_raise_the_loss(task, questions):
    images, ball = batch(task, questions), LinfBall(8 / 255)
    noise = StartNoise(0, [q.id for q in questions])
    losses = [
        AnswerLoss(task)(pgd(AnswerLoss(task), images, ball, steps=steps, noise=noise)).detach().mean()
        for steps in (1, 10)
    ]
    assert losses[1] > losses[0] > AnswerLoss(task)(images).detach().mean()


def test_killed_and_resumed_equals_unbroken(vlm, processor, questions, tmp_path):
    how = VLMProtocol((8 / 255,), steps=3, restarts=1, batch_size=4)
    (whole,) = measure(vlm, processor, questions, how, samples_dir=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        measure(
            vlm,
            processor,
            [*questions[:9], Killed(questions[9]), *questions[10:]],
            how,
            samples_dir=tmp_path / "broken",
        )
    assert len(begun(tmp_path / "broken")) == 8, "two batches were begun and written down"
    (resumed,) = measure(vlm, processor, questions, how, samples_dir=tmp_path / "broken")
    assert lines(tmp_path / "whole") == lines(tmp_path / "broken")
    assert resumed.robust_accuracy == whole.robust_accuracy


def test_a_question_without_an_answer_is_named(vlm, processor, questions):
    """findings-swap 14."""
    with pytest.raises(ValueError, match=rf"questions \[{questions[1].id}\] have no answer"):
        measure(vlm, processor, [questions[0], replace(questions[1], answer=" ")], VLMProtocol((0.0,)))


def test_blank_image_is_a_control(vlm, processor, questions):
    how = VLMProtocol((0.0,), steps=1, restarts=1)
    (seen,) = measure(vlm, processor, questions, how)
    (blank,) = measure(vlm, processor, questions, how, blank=True)
    assert seen.clean_accuracy == seen.robust_accuracy
    assert blank.clean_accuracy < seen.clean_accuracy - 0.3
    assert blank.generation["blank_image"] is True


def test_example_shows_the_attacked_answer(vlm, processor, questions):
    example = attack_example(vlm, processor, questions[0], PROMPT, VLMProtocol((32 / 255,), steps=10, restarts=1))
    assert example.clean_answer == questions[0].answer
    assert example.adversarial_answer != questions[0].answer
    assert (example.adversarial - example.image).abs().max() <= 32 / 255 + 1e-6


def test_saved_images_give_the_reported_numbers(vlm, processor, questions, tmp_path):
    few, how = questions[:6], VLMProtocol((4 / 255, 16 / 255), steps=4, restarts=1)
    kept = [question.id for question in few[1:]]
    with pytest.raises(ValueError, match="needs a samples_dir"):
        measure(vlm, processor, few, how, save_images=kept)
    without = measure(vlm, processor, few, how, samples_dir=tmp_path)
    with pytest.raises(ValueError, match="no images"):
        remeasure_vqa(vlm, processor, few, without[0], tmp_path)
    results = measure(vlm, processor, few, how, samples_dir=tmp_path, save_images=kept)
    assert [result.robust_accuracy for result in results] == [result.robust_accuracy for result in without]
    assert results[1].robust_accuracy < results[1].clean_accuracy
    for result in results:
        again = remeasure_vqa(vlm, processor, few, result, tmp_path)
        assert again.num_samples == 5
        assert (again.changed, again.outside) == ([], [])
        assert again.robust_accuracy == again.reported
        assert again.farthest <= result.eps * (1 + 1e-4)
    assert again.farthest > 4 / 255
    images = AdversarialImages(tmp_path / results[1].images)
    for sample in images.ids():
        clean, _ = images.read(sample, 1.0)
        images.write(sample, clean, {})
    assert remeasure_vqa(vlm, processor, few, results[1], tmp_path).changed
