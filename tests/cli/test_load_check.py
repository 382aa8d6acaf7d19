"""`load-check`: what can be hardened and measured passes with its facts, what can not is refused."""

from __future__ import annotations

import json
import shutil

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, LlavaForConditionalGeneration
from transformers.utils import logging

from hf_robust_vision.cli import main
from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.towers.check import check_load


@pytest.mark.parametrize("fixture", ["clip_folder", "siglip_folder"])
def test_both_towers(fixture, request, capsys):
    folder = request.getfixturevalue(fixture)
    assert main(["load-check", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "image and text towers"
    assert found["model"] == {"clip_folder": "CLIPModel", "siglip_folder": "SiglipModel"}[fixture]
    assert found["image_size"] == [32, 32]
    assert found["pixels_reached"] == 1
    if fixture == "clip_folder":
        model = CLIPModel.from_pretrained(folder)
        assert found["parameters"] == model.num_parameters()
        assert found["tower_parameters"] == model.vision_model.num_parameters()
        assert found["output_shape"] == [1, model.config.projection_dim]


def test_a_vlm(capsys):
    assert main(["load-check", "demo-llava"]) == 0
    said = capsys.readouterr().out
    vlm = LlavaForConditionalGeneration.from_pretrained(demo_checkpoint("demo-llava"))
    tower = vlm.model.vision_tower.num_parameters()
    projector = sum(weight.numel() for weight in vlm.model.multi_modal_projector.parameters())
    assert "LlavaForConditionalGeneration, vision-language model" in said
    assert f"{tower + projector:,} weights, {tower:,} of them the vision tower's" in said
    assert "language_tokens" in said
    assert "reaches 100.0% of the pixels" in said


def test_a_tower_that_no_gradient_leaves_is_refused(clip_folder, tmp_path):
    """Patch embeddings of zeros: the model loads, and every attack on it would fail."""
    folder = shutil.copytree(clip_folder, tmp_path / "dead")
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("patch_embedding.weight"))
    save_file(
        weights | {name: torch.zeros_like(weights[name])}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"0 everywhere|no gradient reaches"):
        check_load(folder)


def test_bars_are_afterwards_as_they_were(clip_folder, capsys):
    logging.enable_progress_bar()
    datasets.enable_progress_bars()
    main(["load-check", str(clip_folder), "--json"])
    assert logging.is_progress_bar_enabled()
    assert not datasets.utils.are_progress_bars_disabled()
