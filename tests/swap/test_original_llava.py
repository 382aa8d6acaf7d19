"""Swap into a LLaVA of the original code, from the PyPI package `llava-torch`.

Its pins are of 2024, so `.ci/run` installs it without its requirements, as it does with OpenFlamingo, and fails if this
file was skipped there.
"""

import copy

import pytest
import torch
from tiny_vlms import SIZE, TEXT, make_clip, randomise
from transformers import CLIPImageProcessor

from hf_robust_vision.swap import find_towers, swap_vision_encoder
from hf_robust_vision.towers.base import weights_sha256


original = pytest.importorskip(
    "llava.model.language_model.llava_llama", reason="installed by .ci/run in an environment of its own"
)

IDS = torch.tensor([[1, 5, -200, 9, 11]])  # the image stands where the original code's -200 is
PIXELS = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def save_tower(tower, folder):
    tower.save_pretrained(folder)
    size = {"height": SIZE, "width": SIZE}
    CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    tower = save_tower(make_clip(3).vision_model, tmp_path_factory.mktemp("tower"))
    text = {key: value for key, value in TEXT.items() if key != "model_type"}
    vision = {"mm_vision_tower": tower, "mm_hidden_size": 32, "mm_vision_select_layer": -2}
    config = original.LlavaConfig(**text, **vision, mm_projector_type="mlp2x_gelu", pretraining_tp=1)
    torch.manual_seed(0)
    model = original.LlavaLlamaForCausalLM(config)
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return randomise(model, 1)


@pytest.fixture
def unloaded(built):
    return copy.deepcopy(built)


@pytest.fixture
def llava(unloaded, monkeypatch):
    """Under transformers 5.24 `generate` hands the cache over by a name that this code of 2024 does not know."""
    forward = original.LlavaLlamaForCausalLM.forward

    def called(self, *args, cache=None, **settings):
        if cache is not None:
            settings["past_key_values"] = cache
        return forward(self, *args, **settings)

    monkeypatch.setattr(original.LlavaLlamaForCausalLM, "forward", called)
    unloaded.get_vision_tower().load_model()
    return unloaded


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, images=PIXELS).logits


def test_swap_forward_generate_save_reload(llava, clip, tmp_path):
    before = logits(llava)

    report = swap_vision_encoder(llava, clip, processor=llava.get_vision_tower().image_processor)

    assert [tower.path for tower in report.towers] == ["model.vision_tower.vision_tower"]
    assert report.towers[0].output_error < 1e-6
    assert any(key.startswith("encoder.layers.3.") for key in report.towers[0].unread_names)
    after = logits(llava)
    assert not torch.equal(before, after)
    assert llava.generate(IDS, images=PIXELS, max_new_tokens=3, do_sample=False).shape == (1, 3)

    # As the report's warning says: a saved model fetches its tower by name.
    assert any("config.mm_vision_tower" in warning for warning in report.warnings)
    llava.config.mm_vision_tower = save_tower(llava.get_vision_tower().vision_tower, tmp_path / "tower")
    llava.save_pretrained(tmp_path / "vlm")
    again = original.LlavaLlamaForCausalLM.from_pretrained(tmp_path / "vlm").eval()
    again.get_vision_tower().load_model()
    assert weights_sha256(again) == weights_sha256(llava)
    assert torch.equal(logits(again), after)


def test_same_weights_change_nothing(llava):
    before, logits_before = weights_sha256(llava), logits(llava)
    report = swap_vision_encoder(llava, find_towers(llava)[0].module)
    assert report.towers[0].changed == 0
    assert weights_sha256(llava) == before
    assert torch.equal(logits(llava), logits_before)


def test_a_tower_in_a_list_is_found(llava, clip):
    llava.model.vision_tower = [llava.model._modules.pop("vision_tower")]  # as under FSDP
    before = logits(llava)
    report = swap_vision_encoder(llava, clip)
    assert [tower.path for tower in report.towers] == ["get_vision_tower().vision_tower"]
    after = logits(llava)
    assert not torch.equal(before, after)
    report.restore()
    assert torch.equal(logits(llava), before)


def test_refusals_leave_it_as_it_was(llava):
    before = weights_sha256(llava)
    for vision, words in (
        ({"hidden_act": "gelu"}, "pass hidden_act='gelu'"),
        ({"num_hidden_layers": 3}, "num_hidden_layers is 4"),
        ({"image_size": 48}, "resize='interpolate'"),
    ):
        with pytest.raises(ValueError, match=words):
            swap_vision_encoder(llava, make_clip(**vision))
        assert weights_sha256(llava) == before


def test_a_tower_that_is_not_loaded(unloaded, clip):
    with pytest.raises(ValueError, match=r"load_model\(\)"):
        swap_vision_encoder(unloaded, clip)


def test_the_v4_folder_is_a_tower_for_it(unloaded, tmp_path):
    from hf_robust_vision.data.demo import demo_checkpoint
    from hf_robust_vision.swap.convert import export_v4

    export_v4(str(demo_checkpoint()), tmp_path / "tower")
    tower = unloaded.get_vision_tower()
    tower.vision_tower_name = str(tmp_path / "tower")
    tower.load_model()
    source = find_towers(tower)[0]
    assert source.geometry.image_size == 64
    assert tower(torch.randn(1, 3, 64, 64)).shape == (1, source.geometry.num_patches, source.geometry.hidden_size)
