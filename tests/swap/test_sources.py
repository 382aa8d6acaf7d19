import shutil

import peft
import pytest
import torch
from lookalikes import LlavaTower, OriginalLlava
from tiny_vlms import FAMILY, logits, make_clip, vlm_inputs
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection

from hf_robust_vision.swap import find_towers, load_source, swap_vision_encoder
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.load import as_encoder


def with_projection(clip):
    model = CLIPVisionModelWithProjection(clip.config.vision_config)
    model.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith("vis")}, strict=True)
    return model


FORMS = {
    "clip": lambda clip: clip,
    "encoder": as_encoder,
    "vision": lambda clip: clip.vision_model,
    "vision with projection": with_projection,
}


@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_models_and_folders(form, as_folder, llava, clip, tmp_path):
    wanted = weights_sha256(clip.vision_model)
    source = FORMS[form](clip)
    if as_folder:
        source.save_pretrained(tmp_path / "robust")
        source = tmp_path / "robust"
    report = swap_vision_encoder(llava, source)
    assert weights_sha256(llava.model.vision_tower) == wanted == report.towers[0].sha256_after
    if as_folder:
        assert report.source == "robust"  # not the whole path: the report is published


@pytest.mark.parametrize("prefix", ["", "vision_model.", "model.vision_tower."])
def test_state_dicts_of_transformers(prefix, llava, clip):
    state = {prefix + key: value for key, value in clip.vision_model.state_dict().items()}
    swap_vision_encoder(llava, {**state, "lm_head.weight": torch.ones(1)} if prefix else state)
    assert weights_sha256(llava.model.vision_tower) == weights_sha256(clip.vision_model)


def test_a_swapped_vlm_is_a_source(llava, vlm_of, clip):
    swap_vision_encoder(llava, clip)
    other = vlm_of("vipllava")
    swap_vision_encoder(other, llava)
    assert weights_sha256(other.model.vision_tower) == weights_sha256(clip.vision_model)


def test_the_processor_of_a_folder_is_compared(llava, clip, tmp_path):
    clip.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    assert "image mean and std equal" in swap_vision_encoder(llava, tmp_path, processor=CLIPImageProcessor()).checks
    half = CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    with pytest.raises(ValueError, match=r"0\.481.*\(0\.5, 0\.5, 0\.5\)"):
        swap_vision_encoder(llava, tmp_path, processor=half)


def test_folders_that_are_no_vision_tower(llava, clip, tmp_path):
    CLIPTextModel(clip.config.text_config).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match=r"text.* holds a 'clip_text_model' model"):
        swap_vision_encoder(llava, tmp_path / "text")
    clip.save_pretrained(tmp_path / "half")
    clip.vision_model.save_pretrained(tmp_path / "vision")
    shutil.copy(tmp_path / "vision" / "model.safetensors", tmp_path / "half")
    with pytest.raises(ValueError, match=r"lacks .* weights of the CLIPModel"):
        swap_vision_encoder(llava, tmp_path / "half")


def trained_adapter(model, folder, pattern):
    targets = peft.LoraConfig(r=2, target_modules=pattern, init_lora_weights=False)
    adapted = peft.get_peft_model(model, targets)
    adapted.save_pretrained(folder)
    return adapted.merge_and_unload()


def test_adapter_folders(llava, clip, tmp_path):
    base = make_clip()
    base.save_pretrained(tmp_path / "base")
    merged = trained_adapter(clip, tmp_path / "adapter", r".*vision_model.*\.(q_proj|v_proj)")
    with pytest.raises(ValueError, match="pass base="):
        swap_vision_encoder(llava, tmp_path / "adapter")
    for given in (base, tmp_path / "base"):
        report = swap_vision_encoder(llava, tmp_path / "adapter", base=given)
        assert report.source == "adapter"
        for key, value in merged.vision_model.state_dict().items():
            torch.testing.assert_close(llava.model.vision_tower.state_dict()[key], value)
    assert weights_sha256(base) == weights_sha256(make_clip())


def test_adapter_of_another_class(llava, clip, tmp_path):
    trained_adapter(clip, tmp_path / "adapter", ["q_proj"])  # also in the text tower, but its keys name vision_model
    with pytest.raises(
        ValueError, match=r"does not fit CLIPVisionModel; it was trained on another class.*missing adapter keys"
    ):
        swap_vision_encoder(llava, tmp_path / "adapter", base=make_clip().vision_model)
    swap_vision_encoder(llava, tmp_path / "adapter", base=make_clip())
    for key, value in clip.vision_model.state_dict().items():
        torch.testing.assert_close(llava.model.vision_tower.state_dict()[key], value)


def test_adapters_that_leave_the_tower_alone(llava, clip, tmp_path):
    trained_adapter(clip, tmp_path / "text", r".*text_model.*\.q_proj")
    with pytest.raises(ValueError, match=r"does not fit CLIPModel; .*another part.*stays as it was"):
        swap_vision_encoder(llava, tmp_path / "text", base=make_clip())
    with pytest.raises(ValueError, match="base= belongs to a PEFT adapter"):
        load_source(clip, base=clip)


@pytest.mark.parametrize("in_list", [False, True])
def test_original_llava(in_list, clip):
    model = OriginalLlava(LlavaTower(make_clip(3).vision_model), in_list=in_list)
    report = swap_vision_encoder(model, clip)
    tower = model.get_vision_tower()[0] if in_list else model.get_vision_tower()
    assert weights_sha256(tower.vision_tower) == weights_sha256(clip.vision_model)
    assert report.towers[0].path == ("get_vision_tower().vision_tower" if in_list else "wrapper.vision_tower")
    assert any(key.startswith("encoder.layers.3") for key in report.towers[0].unread_names)
    with pytest.raises(ValueError, match=r"load_model\(\)"):
        swap_vision_encoder(OriginalLlava(LlavaTower(None)), clip)


@pytest.mark.parametrize("name", FAMILY)
def test_base_models_without_a_head(name, vlm_of, clip):
    vlm = vlm_of(name)
    swap_vision_encoder(vlm.model, clip)
    assert vlm.config.vision_config is vlm.model.config.vision_config
    assert torch.isfinite(logits(vlm, vlm_inputs(name))).all()
    assert all(weights_sha256(tower.module) == weights_sha256(clip.vision_model) for tower in find_towers(vlm))
