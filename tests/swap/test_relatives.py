"""Every class outside the LLaVA family that the docs call supported: swap, forward, generate, save, reload."""

import copy

import pytest
import torch
from relatives import GENERATE, RELATIVES, answer, make_relative
from tiny_vlms import SIZE, make_clip

from hf_robust_vision.swap import find_towers, swap_vision_encoder
from hf_robust_vision.towers.base import weights_sha256


def reload(model, folder):
    """The saved model, in memory as torch lays it out: weights that lie as in the file round otherwise, at times."""
    model.save_pretrained(folder)
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return copy.deepcopy(again).eval()


every = pytest.mark.parametrize("name", RELATIVES)


@every
def test_swap_forward_generate_save_reload(name, clip, tmp_path):
    _, path, make_inputs = RELATIVES[name]
    model, inputs = make_relative(name), make_inputs()
    before = answer(model, inputs)

    report = swap_vision_encoder(model, clip)

    assert [tower.path for tower in report.towers] == [path]
    assert report.towers[0].output_error < 1e-5
    pixel_values = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        got, wanted = (find_towers(m)[0].run(pixel_values)[0] for m in (model, clip))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    after = answer(model, inputs)
    assert not torch.equal(before, after)
    if name in GENERATE:
        said = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert said.shape[1] == inputs["input_ids"].shape[1] + 2

    again = reload(model, tmp_path)
    assert weights_sha256(again) == weights_sha256(model)
    assert torch.equal(answer(again, inputs), after)


@every
def test_same_weights_change_nothing_and_restore_brings_them_back(name, clip):
    _, _, make_inputs = RELATIVES[name]
    model, inputs = make_relative(name), make_inputs()
    before, said, config = weights_sha256(model), answer(model, inputs), model.config.to_dict()
    report = swap_vision_encoder(model, find_towers(model)[0].module)
    assert report.towers[0].changed == 0
    assert weights_sha256(model) == before
    assert torch.equal(answer(model, inputs), said)
    report.restore()
    report = swap_vision_encoder(model, make_clip(hidden_act="gelu"), hidden_act="gelu")
    report.restore()
    assert weights_sha256(model) == before
    assert model.config.to_dict() == config
    assert torch.equal(answer(model, inputs), said)


@every
def test_another_activation_and_other_heads_survive_a_reload(name, tmp_path):
    _, _, make_inputs = RELATIVES[name]
    model, inputs = make_relative(name), make_inputs()
    source = make_clip(hidden_act="gelu", num_attention_heads=2)
    report = swap_vision_encoder(model, source, hidden_act="gelu", num_attention_heads=2)
    assert report.towers[0].output_error < 1e-5
    assert torch.equal(answer(reload(model, tmp_path), inputs), answer(model, inputs))


@every
def test_refusals_leave_it_as_it_was(name):
    model = make_relative(name)
    before = weights_sha256(model)
    for vision, options, words in (
        ({"num_hidden_layers": 3}, {}, "num_hidden_layers is 4"),
        ({"hidden_act": "gelu"}, {}, "pass hidden_act='gelu'"),
        (
            {"image_size": 48},
            {"resize": "native", "processor": object()},
            "resize='native' .*pass resize='interpolate'",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            swap_vision_encoder(model, make_clip(**vision), **options)
        assert weights_sha256(model) == before


@pytest.mark.parametrize("name", ["altclip", "chinese_clip", "metaclip_2", "clip_classifier"])
def test_a_projection_of_another_text_tower_stays(name, clip):
    model = make_relative(name)
    kept = {key: value.clone() for key, value in model.state_dict().items() if "vision_model" not in key}
    swap_vision_encoder(model, clip)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in kept.items())


def test_the_layers_that_a_vlm_reads_are_known():
    model = make_relative("llava_onevision")
    report = swap_vision_encoder(model, make_clip())
    assert all(key.startswith("post_layernorm") for key in report.towers[0].unread_names)  # it reads the last layer
