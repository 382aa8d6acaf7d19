"""The twins of the demo models: their tower is hardened, all else is the original's, and the file can be written again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.pipeline.twins import TOWER_FILE, TWINS, load_twin, write_twin
from hf_robust_vision.towers.load import load_encoder, load_named


def test_only_the_tower_of_a_twin_is_another():
    twin, original = load_twin("demo-llava-hardened"), load_named(demo_checkpoint("demo-llava"))
    states = twin.state_dict(), original.state_dict()
    differ = {key for key in states[1] if not torch.equal(states[0][key], states[1][key])}
    assert differ
    assert all("vision_tower" in key for key in differ)
    shipped = load_file(demo_checkpoint("demo-llava") / TOWER_FILE)
    for key, value in shipped.items():
        assert value.dtype == torch.float16
        if key.startswith("vision_model.") and f"model.vision_tower.{key.removeprefix('vision_model.')}" in states[0]:
            assert torch.equal(states[0][f"model.vision_tower.{key.removeprefix('vision_model.')}"], value.float())


@pytest.mark.parametrize("name", sorted(TWINS))
def test_a_twin_is_written_from_a_hardened_folder(name, tmp_path):
    hardened = load_encoder(demo_checkpoint())
    with torch.no_grad():
        hardened.vision_model.post_layernorm.bias.add_(0.25)
    hardened.save_pretrained(tmp_path / "hardened")
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hardened" / file).write_bytes((demo_checkpoint() / file).read_bytes())
    state = load_file(write_twin(tmp_path / "hardened", name, tmp_path))
    assert all(key.startswith(("vision_model.", "visual_projection.")) for key in state)
    wanted = load_encoder(demo_checkpoint()).vision_model.post_layernorm.bias + 0.25
    assert torch.equal(state["vision_model.post_layernorm.bias"], wanted.half())


def test_a_folder_whose_text_tower_was_trained_makes_no_twin(tmp_path):
    hardened = load_encoder(demo_checkpoint())
    with torch.no_grad():
        hardened.text_projection.weight.add_(1)
    hardened.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_bytes((demo_checkpoint() / "processor_config.json").read_bytes())
    with pytest.raises(ValueError, match=r"differs from the demo CLIP in \['text_projection"):
        write_twin(tmp_path, "demo-llava-hardened", tmp_path / "twin")


def test_there_is_no_other_twin():
    with pytest.raises(ValueError, match="no hardened twin 'demo-smolvlm-hardened'"):
        load_twin("demo-smolvlm-hardened")
