"""`swap`: a stock folder with another tower in it, or nothing at all."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel

from hf_robust_vision.cli import main
from hf_robust_vision.data.demo import demo_checkpoint


@pytest.fixture(scope="module")
def hardened(tmp_path_factory):
    """The demo CLIP, moved a little."""
    folder = tmp_path_factory.mktemp("clip") / "hardened"
    model = CLIPModel.from_pretrained(demo_checkpoint())
    with torch.no_grad():
        for weight in model.vision_model.encoder.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(demo_checkpoint()).save_pretrained(folder)
    return folder


def test_the_folder_is_the_stock_vlm_with_the_new_tower(hardened, tmp_path, capsys):
    out = tmp_path / "new" / "vlm"
    assert main(["swap", "demo-llava", str(hardened), "--output_dir", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["output_dir"] == str(out)
    assert said["towers"][0]["drift"] > 0.5
    saved = json.loads((out / "swap_report.json").read_text())
    assert saved["towers"] == said["towers"]
    assert [path.name for path in out.parent.iterdir()] == ["vlm"]  # and no draft beside it
    vlm, old = (AutoModelForImageTextToText.from_pretrained(at) for at in (out, demo_checkpoint("demo-llava")))
    new = CLIPModel.from_pretrained(hardened).vision_model.state_dict()
    for name, value in vlm.model.vision_tower.state_dict().items():
        assert torch.equal(value, new[name])
    for name, value in vlm.model.language_model.state_dict().items():
        assert torch.equal(value, old.model.language_model.state_dict()[name])
    assert vlm.dtype == old.dtype
    assert AutoProcessor.from_pretrained(out).image_processor is not None


def test_words_for_a_person(hardened, tmp_path, capsys):
    assert main(["swap", "demo-llava", str(hardened), "--output_dir", str(tmp_path / "vlm")]) == 0
    said = capsys.readouterr().out
    assert "clean patch tokens, old to new: mean cosine 0." in said
    assert f"the whole VLM lies in {tmp_path / 'vlm'}" in said


def test_a_failure_leaves_nothing_behind(clip_folder, tmp_path, capsys):
    """Another width is found out after the VLM was read."""
    assert main(["swap", "demo-llava", str(clip_folder), "--output_dir", str(tmp_path / "vlm")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert not list(tmp_path.iterdir())
