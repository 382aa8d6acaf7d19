"""The pre-training of a small SigLIP on a few of the demo's images."""

from __future__ import annotations

import math
import sys

import pretrain_demo_siglip as recipe
import pytest
import torch
from small_clip import build_tokenizer
from transformers import SiglipModel, SiglipProcessor

from hf_robust_vision.data.demo import CLASS_NAMES, load_demo
from hf_robust_vision.data.templates import TEMPLATES
from hf_robust_vision.towers.load import as_encoder, load_encoder


pytest.importorskip("easy_vqa")


@pytest.fixture
def encoder():
    return as_encoder(recipe.build_model(build_tokenizer(TEMPLATES["demo"], CLASS_NAMES)).eval())


def prompts(encoder):
    tokenizer = build_tokenizer(TEMPLATES["demo"], CLASS_NAMES)
    return encoder.tokenize(tokenizer, [f"a {name}" for name in CLASS_NAMES[:4]])


def test_the_loss_of_one_image_a_class_is_transformers(encoder):
    images, texts = torch.rand(4, 3, 64, 64), prompts(encoder)
    with torch.no_grad():
        ours = recipe.siglip_loss(encoder, encoder(images, texts), torch.arange(4))
        pixel_values = encoder.transform.normalize(images)
        stock = SiglipModel.forward(encoder, **texts, pixel_values=pixel_values, return_loss=True)
    torch.testing.assert_close(ours, stock.loss)


def test_all_captions_of_a_class_are_positives(encoder):
    labels = torch.tensor([0, 1, 0, 2])
    with torch.no_grad():
        output = encoder(torch.rand(4, 3, 64, 64), prompts(encoder))
        loss = recipe.siglip_loss(encoder, output, labels).item()
    scale, bias = encoder.logit_scale.exp().item(), encoder.logit_bias.item()
    assert (scale, math.exp(bias)) == pytest.approx((10, 1 / 23))  # one pair in 24 fits
    total = 0.0
    for image, one in zip(output.image_embeds, labels):
        for text, other in zip(output.text_embeds, labels):
            logit = scale * torch.cosine_similarity(image, text, dim=0).item() + bias
            total += math.log1p(math.exp(-logit if one == other else logit))
    assert loss == pytest.approx(total / 4, rel=1e-5)


def test_two_steps_end_in_a_stock_folder(tmp_path, monkeypatch, capsys):
    few = {split: load_demo(split, recipe.TRANSFORM).select(range(16)) for split in ("train", "validation", "test")}
    monkeypatch.setattr(recipe, "load_demo", lambda split, transform: few[split])
    weights = []
    for name in ("one", "two"):
        words = ["--output_dir", str(tmp_path / name), "--max_steps", "2", "--batch_size", "8"]
        monkeypatch.setattr(sys, "argv", ["pretrain_demo_siglip.py", *words])
        recipe.main()
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]  # seeded
    assert "test accuracy" in capsys.readouterr().out
    model = SiglipModel.from_pretrained(tmp_path / "one")
    assert 2e5 < sum(parameter.numel() for parameter in model.parameters()) < 1e6
    assert load_encoder(tmp_path / "one").transform == as_encoder(model).transform
    assert type(SiglipProcessor.from_pretrained(tmp_path / "one")) is SiglipProcessor
