"""The two VLMs that the package ships: how they were made, and what they answer."""

from __future__ import annotations

import sys

import pretrain_demo_llava
import pretrain_demo_smolvlm
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.data.demo_questions import PROMPT, load_questions
from hf_robust_vision.evaluation.tasks.vlm import VLMProtocol
from hf_robust_vision.evaluation.tasks.vqa import evaluate_vqa
from hf_robust_vision.pipeline import parse
from hf_robust_vision.pipeline.harden_vlm import VLMArguments, VLMTrainer, ask


pytest.importorskip("easy_vqa")
NAMES = ["demo-llava", "demo-smolvlm"]


def chat(processor, text):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


@pytest.mark.parametrize("name", NAMES)
def test_it_answers_on_the_stock_path(name):
    folder = demo_checkpoint(name)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(folder).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    questions = load_questions("test", yes_no=False, limit=40)
    right = 0
    for question in questions:
        image = Image.open(question.image).convert("RGB")
        inputs = processor(images=image, text=chat(processor, question.text), return_tensors="pt")
        said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        right += processor.decode(said, skip_special_tokens=True).strip() == question.answer
    assert right >= 38


def test_the_smolvlm_has_no_clip_and_is_small():
    folder = demo_checkpoint("demo-smolvlm")
    assert "clip" not in (folder / "config.json").read_text().lower()
    assert (folder / "model.safetensors").stat().st_size < 4_000_000


def test_the_recipes_make_the_shipped_tokenizers_and_templates():
    train = load_questions("train")
    for name, recipe in zip(NAMES, (pretrain_demo_llava, pretrain_demo_smolvlm)):
        shipped = AutoProcessor.from_pretrained(demo_checkpoint(name))
        assert recipe.build_tokenizer(train).get_vocab() == shipped.tokenizer.get_vocab()
        assert shipped.chat_template == recipe.CHAT_TEMPLATE
    assert chat(AutoProcessor.from_pretrained(demo_checkpoint("demo-llava")), "{}") == PROMPT


def test_the_smolvlm_trains_on_what_its_processor_makes():
    processor = AutoProcessor.from_pretrained(demo_checkpoint("demo-smolvlm"))
    question = load_questions("validation", yes_no=False, limit=1)[0]
    image = Image.open(question.image).convert("RGB")
    stock = processor(images=image, text=chat(processor, question.text), return_tensors="pt")
    lesson = pretrain_demo_smolvlm.Lesson([question], [])
    ours = lesson.encode(processor.tokenizer, [question])["input_ids"]
    assert ours[:, :-2].tolist() == stock["input_ids"].tolist()
    pixels = pretrain_demo_smolvlm.TRANSFORM.normalize(lesson.images)
    assert torch.allclose(pixels, stock["pixel_values"][0], atol=1e-6)


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path, monkeypatch, capsys):
    def train(name, steps=4):
        words = ["--output_dir", tmp_path / name, "--max_steps", steps, "--batch_size", 4, "--checkpoint_minutes", 0]
        monkeypatch.setattr(sys, "argv", ["pretrain_demo_smolvlm.py", *map(str, words)])
        pretrain_demo_smolvlm.main()
        return (tmp_path / name / "model" / "model.safetensors").read_bytes()

    def interrupted(self, lesson):
        if self.step == 2:
            monkeypatch.setattr(pretrain_demo_smolvlm.Pretraining, "update", update)
            raise KeyboardInterrupt
        return update(self, lesson)

    few = load_questions("validation")[:40]
    monkeypatch.setattr(pretrain_demo_smolvlm, "load_questions", lambda split: few)
    update = pretrain_demo_smolvlm.Pretraining.update
    whole = train("whole")
    monkeypatch.setattr(pretrain_demo_smolvlm.Pretraining, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train("killed")
    assert train("killed") == whole
    assert "goes on from step 2 of 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match="choose another --output_dir"):
        train("killed", steps=5)


@pytest.mark.parametrize("name", NAMES)
def test_hardening_asks_each_by_its_own_template(name, tmp_path):
    words = ["--num_questions", "8", "--test_steps", "1", "--test_restarts", "1", "--test_eps", "1/255"]
    words += ["--output_dir", str(tmp_path), "--use_cpu", "true", "--per_device_eval_batch_size", "8"]
    options, args = parse(VLMTrainer, words, options=VLMArguments, name="harden-vlm")
    (result,) = ask(str(demo_checkpoint(name)), options, args, "before")
    assert result.clean_accuracy >= 7 / 8
    assert result.generation["chat_template"].endswith("ssistant:" if name == "demo-smolvlm" else "ssistant :")


def test_a_grey_image_is_an_image(tmp_path):
    """SmolVLM takes pixel values of 0 for padding, and a grey of exactly 0.5 becomes them."""
    folder = demo_checkpoint("demo-smolvlm")
    vlm, processor = AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    about = {"prompt": "{}", "model_name": "before", "dataset": "demo", "split": "test", "progress": False}
    questions = load_questions("test", yes_no=False, limit=8)
    how = VLMProtocol((1 / 255,), steps=1, restarts=1)
    assert evaluate_vqa(vlm, processor, questions, how, blank=True, **about)[0].clean_accuracy < 1
