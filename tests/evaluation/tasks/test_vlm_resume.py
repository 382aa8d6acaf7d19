"""Records on disk are used again only where everything that decides the answers is the same."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from hf_robust_vision.data.demo_questions import load_questions
from hf_robust_vision.evaluation.task import Batch
from hf_robust_vision.evaluation.tasks import VQA, CaptionMetric, VLMProtocol, evaluate_vqa
from hf_robust_vision.swap.flamingo import FlamingoInputs
from hf_robust_vision.towers.vlm_inputs import vlm_inputs
from tests.swap.tiny_vlms import IMAGE_TOKEN, VIDEO_TOKEN, VOCAB
from tests.towers.flamingo_stand_in import make_flamingo
from tests.towers.tiny_processors import PROMPT, Asked, make_processor, make_speaker, make_tokenizer


@dataclass(frozen=True)
class Named(Asked):
    fingerprint: str = ""


def test_generation_settings_and_images_are_in_the_key(tmp_path):
    inputs = vlm_inputs(make_speaker("llava"), make_processor("llava"))
    clean = VLMProtocol((0.0,), steps=1)
    about = {"prompt": PROMPT, "model_name": "before", "dataset": "noise", "split": "test", "progress": False}

    def files(sample):
        evaluate_vqa(inputs.vlm, inputs, [sample], clean, samples_dir=tmp_path, **about)
        return len(list(tmp_path.glob("*.jsonl")))

    assert [files(Asked(0)), files(Named(0)), files(Named(0, fingerprint="a"))] == [1, 1, 2]
    inputs.vlm.generation_config.repetition_penalty = 1.5
    assert files(Asked(0)) == 3


def test_flamingos_modules_and_settings_are_in_the_key():
    model = make_flamingo(VOCAB, IMAGE_TOKEN, VIDEO_TOKEN)
    inputs = FlamingoInputs(model, make_tokenizer())
    seen = [inputs.identity()]
    assert seen[0] == inputs.identity()
    for block in model.vision_encoder.transformer.resblocks:
        block.mlp.gelu = nn.GELU()
    seen.append(inputs.identity())
    model.vision_encoder.final_ln_after_pool = True
    seen.append(inputs.identity())
    model.lang_encoder.generation_config.repetition_penalty = 1.5
    seen.append(inputs.identity())
    assert all(one != two for place, one in enumerate(seen) for two in seen[:place])


def test_metrics_of_one_name_are_told_apart():
    def one(caption, references):
        return float(caption in references)

    def other(caption, references):
        return float(caption not in references)

    assert CaptionMetric("score", one).identity() == CaptionMetric("score", one).identity()
    assert CaptionMetric("score", one).identity() != CaptionMetric("score", other).identity()
    assert CaptionMetric("score", one).identity() != CaptionMetric("score", one, {"n": "4"}).identity()
    assert CaptionMetric("score", max).identity() != CaptionMetric("score", min).identity()


def test_the_demos_questions_name_their_images():
    pytest.importorskip("easy_vqa")
    asked = load_questions("test", limit=20)
    for question in asked:
        assert all((question.image == other.image) >= (question.fingerprint == other.fingerprint) for other in asked)


def test_each_objective_starts_at_points_of_its_own():
    images = torch.zeros(2, 3, 4, 4)
    inputs = vlm_inputs(make_speaker("llava"), make_processor("llava"))
    task = VQA(inputs.vlm, inputs, [Asked(3), Asked(4)], PROMPT, "noise", "test")
    stages, batch = task.levels(VLMProtocol((0.1,)).robustness())[0].stages, Batch((0, 1), images)
    nll, margin = (task.starts(stage, batch, 0).draw(images) for stage in stages)
    assert torch.equal(nll, task.starts(stages[0], batch, 0).draw(images))
    assert (nll != margin).flatten(1).any(1).all()
