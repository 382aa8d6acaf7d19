"""A new method is one short file: it trains, goes on after a stop, is recorded and saved (findings-code 10)."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import CLIPModel

from tests.methods import toy_method
from tests.methods.toy_method import ToyTrainer
from tests.training.helpers import SGD, largest_gap, make_trainer, weights


RUN = SGD | {"learning_rate": 1e-5, "kind": ToyTrainer, "save_strategy": "steps", "save_steps": 2, "toy_weight": 0.5}


def test_it_is_short():
    assert len(Path(toy_method.__file__).read_text().splitlines()) < 40


def test_it_trains_resumes_and_is_saved(clip_folder, tmp_path):
    whole = make_trainer(clip_folder, tmp_path / "whole", max_steps=4, **RUN)
    before = weights(whole)
    whole.train()
    parts = [make_trainer(clip_folder, tmp_path / "parts", max_steps=steps, **RUN) for steps in (2, 4)]
    parts[0].train()
    parts[1].train(resume_from_checkpoint=True)
    assert largest_gap(weights(parts[1]), weights(whole)) == 0
    assert largest_gap(weights(whole), before) > 0
    parts[1].save_model()
    saved = CLIPModel.from_pretrained(tmp_path / "parts").state_dict()
    assert largest_gap(saved, weights(whole)) == 0
    record = parts[1].training_record()
    assert {"method": "Toy", "toy_weight": 0.5, "steps": 4}.items() <= record.items()
    other = make_trainer(clip_folder, tmp_path / "parts", max_steps=4, **(RUN | {"toy_weight": 2.0}))
    with pytest.raises(ValueError, match=r"trained with --toy_weight 0\.5"):
        other.train(resume_from_checkpoint=True)


def test_only_the_pooled_embedding_trains(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, **RUN)
    trainable = {name.split(".")[0] for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert trainable == {"vision_model", "visual_projection"}
