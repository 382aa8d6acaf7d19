import json

import pytest
import torch
from tiny_vlms import FAMILY, LAYERS, SIZE, logits, make_clip, make_vlm, vlm_inputs

from hf_robust_vision.swap import find_towers, swap_vision_encoder
from hf_robust_vision.towers.base import weights_sha256


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


@pytest.mark.parametrize("name", FAMILY)
def test_another_activation_and_other_heads_survive_a_reload(name, vlm_of, tmp_path):
    vlm, inputs = vlm_of(name), vlm_inputs(name)
    source = make_clip(hidden_act="gelu", num_attention_heads=2)
    report = swap_vision_encoder(vlm, source, hidden_act="gelu", num_attention_heads=2)
    assert all(tower.output_error < 1e-6 for tower in report.towers)
    assert any("hidden_act of the tower was switched to 'gelu'" in warning for warning in report.warnings)
    vlm.save_pretrained(tmp_path)
    again = type(vlm).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs), logits(vlm, inputs))
    pixel_values = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = source.vision_model(pixel_values).last_hidden_state
        assert torch.equal(find_towers(again)[0].module(pixel_values).last_hidden_state, wanted)


@pytest.mark.parametrize("name", FAMILY)
def test_restore(name, vlm_of):
    vlm, inputs = vlm_of(name), vlm_inputs(name)
    before, config, before_logits = weights_sha256(vlm), vlm.config.to_dict(), logits(vlm, inputs)
    first = swap_vision_encoder(vlm, make_clip(hidden_act="gelu"), hidden_act="gelu")
    second = swap_vision_encoder(vlm, make_clip(9, hidden_act="gelu"))
    assert first.towers[0].sha256_after == second.towers[0].sha256_before
    swapped, swapped_config = weights_sha256(vlm), vlm.config.to_dict()
    with pytest.raises(RuntimeError, match="restore\\(\\) of the latest report first"):
        first.restore()
    assert weights_sha256(vlm) == swapped
    assert vlm.config.to_dict() == swapped_config
    second.restore()
    first.restore()
    assert weights_sha256(vlm) == before
    assert vlm.config.to_dict() == config
    assert torch.equal(logits(vlm, inputs), before_logits)
    with pytest.raises(RuntimeError, match="brought back already"):
        first.restore()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tower_keeps_its_dtype_flags_and_parameters(dtype, llava, clip):
    llava.to(dtype).requires_grad_(False).train()
    llava.gradient_checkpointing_enable()
    tower = llava.model.vision_tower
    parameters = dict(tower.named_parameters())
    report = swap_vision_encoder(llava, clip)
    assert llava.model.vision_tower is tower
    assert all(parameter is parameters[name] for name, parameter in tower.named_parameters())
    assert {parameter.dtype for parameter in tower.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert tower.training
    assert tower.encoder.layers[0].gradient_checkpointing
    assert llava.config.vision_config is tower.config
    assert weights_sha256(tower) == weights_sha256(clip.vision_model.to(dtype))
    assert 0 <= report.towers[0].output_error < 0.05


def test_eager_attention_and_the_random_state_are_kept(llava, clip):
    llava.set_attn_implementation("eager")
    state = torch.get_rng_state()
    report = swap_vision_encoder(llava, clip)
    assert torch.equal(torch.get_rng_state(), state)
    assert llava.model.vision_tower.config._attn_implementation == "eager"
    assert report.towers[0].output_error < 1e-5


def test_dropout_does_not_disturb_the_verification(clip):
    vlm = make_vlm("llava", attention_dropout=0.5).train()
    assert swap_vision_encoder(vlm, clip).towers[0].output_error < 1e-6
    assert vlm.model.vision_tower.training


def test_config_of_a_vlm_whose_tower_was_replaced(llava, tmp_path):
    source = make_clip(hidden_act="gelu")
    llava.model.vision_tower = make_clip(9, hidden_act="gelu").vision_model
    swap_vision_encoder(llava, source)
    llava.save_pretrained(tmp_path)
    inputs = vlm_inputs("llava")
    assert torch.equal(logits(type(llava).from_pretrained(tmp_path).eval(), inputs), logits(llava, inputs))


def test_one_of_two_towers(vlm_of, clip):
    vlm = vlm_of("video_llava")
    untouched = weights_sha256(vlm.model.video_tower)
    report = swap_vision_encoder(vlm, clip, towers="model.image_tower")
    assert [tower.path for tower in report.towers] == ["model.image_tower"]
    assert weights_sha256(vlm.model.video_tower) == untouched


def test_towers_that_are_one_module_are_swapped_once(vlm_of, clip):
    vlm = vlm_of("video_llava")
    vlm.model.video_tower = vlm.model.image_tower
    before = weights_sha256(vlm)
    report = swap_vision_encoder(vlm, clip)
    assert len(report.towers) == 1
    assert weights_sha256(vlm.model.video_tower) == weights_sha256(clip.vision_model)
    report.restore()
    assert weights_sha256(vlm) == before


def test_report_is_saved_as_json(llava, clip, tmp_path):
    report = swap_vision_encoder(llava, clip)
    path = report.save(tmp_path / "swapped")
    assert path.name == "swap_report.json"
    saved = json.loads(path.read_text())
    assert saved == report.to_dict()
    tower = saved["towers"][0]
    assert tower["parameters"] == sum(p.numel() for p in llava.model.vision_tower.parameters())
    assert 0.99 * tower["parameters"] < tower["changed"] <= tower["parameters"]
    assert "tokens equal the source's at every layer" in saved["checks"]


def test_without_verification_nothing_is_run(llava, clip):
    llava.model.vision_tower.forward = None
    report = swap_vision_encoder(llava, clip, verify=False)
    assert report.towers[0].drift is None
    assert report.towers[0].output_error is None


def test_clip_model_takes_the_projection_too(clip):
    model = make_clip(11)
    report = swap_vision_encoder(model, clip)
    assert report.towers[0].path == "vision_model"
    assert torch.equal(model.visual_projection.weight, clip.visual_projection.weight)
    kept = make_clip(11)
    report = swap_vision_encoder(kept, clip.vision_model)
    assert torch.equal(kept.visual_projection.weight, make_clip(11).visual_projection.weight)
    assert any("no projection" in warning for warning in report.warnings)


def test_compiled_tower_and_wrapped_model(llava, clip):
    inputs = vlm_inputs("llava")
    llava.model.vision_tower = torch.compile(llava.model.vision_tower, backend="eager")
    logits(llava, inputs)
    report = swap_vision_encoder(llava, clip)
    assert report.towers[0].path == "model.vision_tower._orig_mod"
    after = logits(llava, inputs)
    llava.model.vision_tower = llava.model.vision_tower._orig_mod
    assert torch.equal(logits(llava, inputs), after)
    assert weights_sha256(llava.model.vision_tower) == weights_sha256(clip.vision_model)
    wrapped = torch.nn.DataParallel(llava)
    assert swap_vision_encoder(wrapped, clip).towers[0].path == "module.model.vision_tower"
