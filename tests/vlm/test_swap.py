import pytest
import torch
from tiny_vlms import FAMILY, LAYERS, logits, vlm_inputs

from hf_robust_vision.encoders import weights_sha256
from hf_robust_vision.vlm import find_towers, swap_vision_encoder


PATHS = {name: ["model.vision_tower"] for name in FAMILY} | {"video_llava": ["model.video_tower", "model.image_tower"]}


@pytest.mark.parametrize("name", FAMILY)
def test_swap_forward_generate_save_reload(name, vlm_of, clip, tmp_path):
    vlm, inputs = vlm_of(name), vlm_inputs(name)
    before = logits(vlm, inputs)

    report = swap_vision_encoder(vlm, clip)

    assert [tower.path for tower in report.towers] == PATHS[name]
    for tower in find_towers(vlm):
        assert weights_sha256(tower.module) == weights_sha256(clip.vision_model)
    after = logits(vlm, inputs)
    assert not torch.equal(before, after)
    assert all(tower.drift < 0.999 and tower.output_error < 1e-6 for tower in report.towers)
    assert vlm.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2

    vlm.save_pretrained(tmp_path)
    again, info = type(vlm).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert weights_sha256(again) == weights_sha256(vlm)
    assert torch.equal(logits(again.eval(), inputs), after)
    assert again.config.robust_vision_swap["towers"][0]["sha256_after"] == weights_sha256(clip.vision_model)


@pytest.mark.parametrize("name", FAMILY)
def test_same_weights_change_nothing(name, vlm_of):
    vlm, inputs = vlm_of(name), vlm_inputs(name)
    before, logits_before = weights_sha256(vlm), logits(vlm, inputs)
    source = find_towers(vlm)[-1].module  # VideoLlava's two towers differ; the other one changes
    report = swap_vision_encoder(vlm, source, towers=find_towers(vlm)[-1].path)
    assert weights_sha256(vlm) == before
    assert torch.equal(logits(vlm, inputs), logits_before)
    assert report.towers[0].changed == 0
    assert report.towers[0].drift == pytest.approx(1)
    assert report.towers[0].sha256_before == report.towers[0].sha256_after


@pytest.mark.parametrize("name", FAMILY)
def test_unread_weights_are_never_read(name, vlm_of, clip):
    vlm, inputs = vlm_of(name), vlm_inputs(name)
    report = swap_vision_encoder(vlm, clip)
    before = logits(vlm, inputs)
    for tower, entry in zip(find_towers(vlm), report.towers, strict=True):
        assert any(key.startswith(f"encoder.layers.{LAYERS - 1}.") for key in entry.unread_names)
        assert any(key.startswith("post_layernorm") for key in entry.unread_names)
        assert entry.unread == sum(tower.weights()[key].numel() for key in entry.unread_names)
        for key in entry.unread_names:
            torch.nn.init.normal_(tower.weights()[key])
    assert torch.equal(logits(vlm, inputs), before)
