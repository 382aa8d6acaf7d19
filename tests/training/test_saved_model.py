"""What every method leaves: the folder of a stock CLIP."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from hf_robust_vision.methods.agft import AGFTTrainer
from hf_robust_vision.methods.fare import FARETrainer
from hf_robust_vision.methods.pmg_aft import PMGAFTTrainer
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.methods.tima import TIMATrainer
from tests.training.helpers import make_trainer, weights


@pytest.mark.parametrize("kind", [AGFTTrainer, FARETrainer, PMGAFTTrainer, SimCLIPTrainer, TeCoATrainer, TIMATrainer])
def test_transformers_alone_loads_it(kind, clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, kind=kind, max_steps=1, learning_rate=1e-3)
    start = weights(trainer)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["CLIPModel"]
    assert "auto_map" not in config
    model, loaded = CLIPModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    assert type(CLIPProcessor.from_pretrained(tmp_path / "model")) is CLIPProcessor
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights(trainer).items())
    moved = {name.split(".")[0] for name, value in start.items() if not torch.equal(found[name], value)}
    assert "vision_model" in moved
    assert ("text_model" in moved) is (kind is TIMATrainer)
