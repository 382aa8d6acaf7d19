"""Bytes that an update keeps: of the images, and not of the weights."""

from __future__ import annotations

import pytest
import torch
from benchmark_memory import FULL, GIB, HEADROOM, bytes_of, fits, kept, memory_by_size
from transformers import CLIPVisionConfig, CLIPVisionModel


TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}  # fmt: skip


def test_each_image_keeps_the_same_and_weights_do_not_count():
    torch.manual_seed(0)
    model = CLIPVisionModel(CLIPVisionConfig(**TOWER)).train()
    one, two, four = (kept(model, images) for images in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), rel=0.02)
    # At the least the inputs of the six linear layers of each block, in bfloat16, and of the norms in float32.
    tokens = (32 // 8) ** 2 + 1
    assert two - one >= 4 * tokens * (2 * (32 + 32 + 32 + 64) + 2 * 4 * 32)
    assert two - one <= 4 * tokens * 32 * 80


def test_layers_that_are_computed_again_keep_less():
    found = bytes_of(TOWER)
    assert found["parameters"] == CLIPVisionModel(CLIPVisionConfig(**TOWER)).num_parameters()
    assert found["whole"] / TOWER["num_hidden_layers"] < found["again"] < found["whole"]


def test_what_fits_on_a_card(monkeypatch):
    assert HEADROOM == 0.85
    assert fits(24, 2 * GIB, GIB / 2) == "36"  # (20.4 - 2) * 2
    assert fits(24, 30 * GIB, GIB) == "-"
    monkeypatch.setattr("benchmark_memory.TOWERS", {"tiny": TOWER})
    monkeypatch.setattr("benchmark_memory.bytes_of", lambda _: {"parameters": 1e9, "whole": GIB, "again": GIB / 2})
    assert FULL == 22
    # 20.49 GiB are fixed: more than 0.85 of 24, and of 80 they leave 47.5.
    assert memory_by_size()[2] == "| tiny | 1000 | 20.5 | 5.6 | 1,024 | 512 | - | - | 47 | 95 |"
