"""A hardened SigLIP into VLMs whose tower is a SigLIP: the transaction of CLIP's, without class token and mostly without head."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from tiny_vlms import make_clip, make_vlm, randomise
from transformers import AutoModelForImageTextToText, Siglip2Config, Siglip2Model, SiglipConfig, SiglipModel

from hf_robust_vision import as_encoder, load_encoder, swap_vision_encoder
from hf_robust_vision.swap import SwapReport, find_towers, load_source
from hf_robust_vision.swap.layouts import SiglipTower
from hf_robust_vision.towers.adapters import add_adapter, save_adapter
from hf_robust_vision.towers.base import Reads, freeze_unread, weights_sha256
from tests.towers.zoo import tiny_vlm


FAMILIES = ("llava_onevision", "paligemma", "gemma3")
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make_siglip(seed=7, **vision):
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": 32, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    own = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    own |= {"image_size": 32, "patch_size": 8} | vision
    return randomise(SiglipModel(SiglipConfig(text_config=text, vision_config=own)), seed)


def put_in(vlm, siglip):
    """As a VLM that left its tower as it was published."""
    (tower,) = find_towers(vlm)
    tower.module.load_state_dict(
        siglip.vision_model.state_dict(), strict="head" in dict(tower.module.named_children())
    )
    return vlm


def tokens(vlm, processor):
    with torch.no_grad():
        return as_encoder(vlm, processor)(IMAGES).language_tokens


@pytest.mark.parametrize("form", ["model", "encoder", "vision tower", "state dict", "file", "folder"])
@pytest.mark.parametrize("family", FAMILIES)
def test_swap_save_reload_restore(family, form, tmp_path):
    vlm, processor = tiny_vlm(family)
    siglip, before = make_siglip(), weights_sha256(vlm)
    sources = {
        "model": siglip, "encoder": as_encoder(siglip), "vision tower": siglip.vision_model,
        "state dict": siglip.state_dict(), "file": tmp_path / "weights.safetensors", "folder": tmp_path / "siglip",
    }  # fmt: skip
    if form == "file":
        save_file(siglip.state_dict(), sources[form])
    if form == "folder":
        siglip.save_pretrained(sources[form])
    old = tokens(vlm, processor)

    report = swap_vision_encoder(vlm, sources[form])

    (tower,), (told,) = find_towers(vlm), report.towers
    assert isinstance(tower, SiglipTower)
    assert told.path == "model.vision_tower"
    assert told.output_error < 1e-6
    assert told.drift < 0.999
    wanted = siglip.vision_model.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in tower.module.state_dict().items())
    assert hasattr(tower.module, "head") == (family == "llava_onevision")
    new = tokens(vlm, processor)
    assert not torch.equal(old, new)
    vlm.save_pretrained(tmp_path / "vlm")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm").eval()
    assert weights_sha256(again) == weights_sha256(vlm)
    assert torch.equal(tokens(again, processor), new)
    assert again.config.robust_vision_swap["towers"][0]["sha256_after"] == told.sha256_after
    report.restore()
    assert weights_sha256(vlm) == before
    assert torch.equal(tokens(vlm, processor), old)


def test_tokens_are_those_of_the_source():
    vlm, _ = tiny_vlm("paligemma")
    siglip = make_siglip()
    swap_vision_encoder(vlm, siglip)
    with torch.no_grad():
        got = vlm.model.vision_tower(IMAGES).last_hidden_state
        assert torch.equal(got, siglip.vision_model(IMAGES).last_hidden_state)


def test_a_head_that_nothing_reads_is_told():
    vlm, _ = tiny_vlm("llava_onevision")
    (told,) = swap_vision_encoder(vlm, make_siglip()).towers
    assert {name.split(".")[0] for name in told.unread_names} == {"head", "post_layernorm"}


def test_positions_are_interpolated_without_a_class_token():
    vlm, _ = tiny_vlm("gemma3")
    siglip = make_siglip(image_size=48)
    report = swap_vision_encoder(vlm, siglip, resize="interpolate")
    positions = (
        siglip.vision_model.embeddings.position_embedding.weight.detach().reshape(1, 6, 6, -1).permute(0, 3, 1, 2)
    )
    wanted = torch.nn.functional.interpolate(positions, size=(4, 4), mode="bicubic", align_corners=False)
    got = vlm.model.vision_tower.embeddings.position_embedding.weight
    torch.testing.assert_close(got, wanted.permute(0, 2, 3, 1).reshape(16, -1))
    assert any("from 36 to 16 patches" in note for note in report.warnings)


@pytest.mark.parametrize("further", [False, True])
def test_a_tower_that_was_trained_further_is_told(further, tmp_path):
    """PaliGemma's equals no published SigLIP: an adapter names what it was trained on, and that is compared."""
    original = make_siglip()
    original.save_pretrained(tmp_path / "original")
    encoder = as_encoder(copy.deepcopy(original))
    freeze_unread(encoder, Reads("both"))
    encoder.name_or_path = str(tmp_path / "original")
    add_adapter(encoder, 2, 4.0, target_modules=None, seed=0)
    with torch.no_grad():
        for name, value in encoder.named_parameters():
            if "lora_B" in name:
                value += 0.05
    save_adapter(encoder, tmp_path / "adapter")
    vlm = put_in(tiny_vlm("llava_onevision")[0], original)
    if further:
        with torch.no_grad():
            vlm.model.vision_tower.encoder.layers[0].mlp.fc1.bias += 0.01
    report = swap_vision_encoder(vlm, tmp_path / "adapter")
    assert report.towers[0].off_original == (64 if further else 0)
    assert report.to_dict()["towers"][0]["off_original"] == report.towers[0].off_original
    assert any("has trained its tower further" in note for note in report.warnings) == further


def test_what_is_not_compared_is_said():
    vlm, _ = tiny_vlm("paligemma")
    first = swap_vision_encoder(vlm, make_siglip())
    assert first.towers[0].off_original is None
    assert any("not compared with the SigLIP" in note and "PaliGemma" in note for note in first.warnings)
    again = swap_vision_encoder(vlm, make_siglip())  # equal already: nothing is lost
    assert again.towers[0].changed == 0
    assert not any("not compared with the SigLIP" in note for note in again.warnings)


def half(siglip):
    return {name: value for name, value in siglip.state_dict().items() if "layers.2." not in name or "fc1" in name}


def headless(siglip):
    del siglip.vision_model.head.mlp.fc1.bias
    return siglip.state_dict()


REFUSED = {
    "a CLIP": ("paligemma", make_clip, r"the source is a CLIP, .* is a SigLIP.*harden-vlm"),
    "into a CLIP": ("llava", make_siglip, r"the source is a SigLIP, .* is a CLIP"),
    "another width": ("gemma3", lambda: make_siglip(hidden_size=48), "hidden_size is 32 in the tower and 48"),
    "another size": ("gemma3", lambda: make_siglip(image_size=48), "resize='interpolate'"),
    "cut": ("gemma3", lambda: half(make_siglip()), "not that of a SiglipVisionModel.*missing keys"),
    "half a head": ("gemma3", lambda: headless(make_siglip()), "head of this SigLIP is not whole.*fc1.bias"),
    "not finite": ("gemma3", lambda: nan(make_siglip()), "NaN or infinity"),
}


def nan(siglip):
    siglip.vision_model.encoder.layers[2].mlp.fc2.bias.data[0] = torch.nan
    return siglip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_vlm_as_it_was(case):
    family, source, message = REFUSED[case]
    vlm = make_vlm("llava") if family == "llava" else tiny_vlm(family)[0]
    before = weights_sha256(vlm)
    with pytest.raises(ValueError, match=message):
        swap_vision_encoder(vlm, source())
    assert weights_sha256(vlm) == before
    assert not hasattr(vlm.config, "robust_vision_swap")


@pytest.mark.parametrize("form", ["model", "vision tower", "state dict", "folder", "folder of the tower"])
def test_a_source_of_free_image_size_is_refused_by_name(form, tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = small | {"vocab_size": 40, "bos_token_id": 2, "eos_token_id": 3}
    vision = small | {"num_patches": 16, "patch_size": 8}
    model = Siglip2Model(Siglip2Config(vision_config=vision, text_config=text))
    sources = {"model": model, "vision tower": model.vision_model, "state dict": model.state_dict()}
    if form not in sources:
        (model if form == "folder" else model.vision_model).save_pretrained(tmp_path)
    vlm = tiny_vlm("paligemma")[0]
    before = weights_sha256(vlm)
    in_memory = form in ("model", "vision tower")
    message = "no CLIP or SigLIP vision tower in Siglip2" if in_memory else r"SigLIP 2 of free image size \(NaFlex\)"
    with pytest.raises(ValueError, match=message):
        swap_vision_encoder(vlm, sources.get(form, tmp_path))
    assert weights_sha256(vlm) == before


def test_an_activation_is_switched_in_the_head_too():
    siglip = make_siglip(hidden_act="gelu")
    vlm, _ = tiny_vlm("llava_onevision")
    report = swap_vision_encoder(vlm, siglip, hidden_act="gelu", num_attention_heads=4)
    assert vlm.model.vision_tower.config.hidden_act == "gelu"
    assert type(vlm.model.vision_tower.head.mlp.activation_fn) is type(siglip.vision_model.head.mlp.activation_fn)
    assert report.towers[0].output_error < 1e-6
    report.restore()
    assert vlm.config.vision_config.hidden_act == "gelu_pytorch_tanh"


def test_a_vlm_that_failed_on_its_way_is_brought_back(monkeypatch):
    vlm, _ = tiny_vlm("gemma3")
    before = weights_sha256(vlm)
    monkeypatch.setattr(SwapReport, "provenance", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        swap_vision_encoder(vlm, make_siglip())
    assert weights_sha256(vlm) == before


def test_what_training_saved_can_be_swapped_in(tmp_path):
    """The folder of a run: weights that are the tower's own."""
    make_siglip().save_pretrained(tmp_path)
    from transformers import SiglipImageProcessor

    SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    source = load_source(tmp_path)
    assert source.pixels.mean == encoder.transform.mean == (0.5, 0.5, 0.5)
    assert source.kind is SiglipTower
    vlm, processor = tiny_vlm("paligemma")
    report = swap_vision_encoder(vlm, tmp_path, processor=processor)
    assert "image mean and std equal" in report.checks
