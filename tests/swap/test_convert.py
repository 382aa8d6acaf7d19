from __future__ import annotations

import pytest
import torch
from tiny_vlms import make_clip
from transformers import AutoImageProcessor, CLIPConfig, CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hf_robust_vision.cli import main
from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.swap.convert import export_open_clip


@pytest.fixture(scope="module")
def demo():
    return str(demo_checkpoint())


def test_export_and_convert_round_trip_is_bit_equal(demo, tmp_path, capsys):
    assert main(["export", demo, "--to", "open_clip", "--output", str(tmp_path / "tower.pt")]) == 0
    assert "force_quick_gelu=True" in capsys.readouterr().out
    weights = torch.load(tmp_path / "tower.pt", weights_only=True)
    weights["conv1.weight"] = weights["conv1.weight"] + 1  # a conversion that kept the base's weights would pass
    torch.save(weights, tmp_path / "tower.pt")
    command = ["convert", str(tmp_path / "tower.pt"), "--base", demo, "--output", str(tmp_path / "model")]
    assert main([*command, "--hidden_act", "quick_gelu"]) == 0
    original, converted = CLIPModel.from_pretrained(demo), CLIPModel.from_pretrained(tmp_path / "model")
    for (name, old), new in zip(original.state_dict().items(), converted.state_dict().values(), strict=True):
        shift = 1 if name.endswith("patch_embedding.weight") else 0
        assert torch.equal(old + shift, new), name


@pytest.mark.parametrize(("act", "quick", "name"), [("quick_gelu", True, "QuickGELU"), ("gelu", False, "GELU")])
def test_pasted_lines_ask_for_a_text_tower_and_name_the_activation(tmp_path, act, quick, name):
    make_clip(hidden_act=act).save_pretrained(tmp_path / "clip")
    text = export_open_clip(str(tmp_path / "clip"), tmp_path / "tower.pt")
    (line,) = [line for line in text.splitlines() if "create_model_and_transforms" in line]
    assert f"pretrained='<that of its text tower>', force_quick_gelu={quick})" in line
    (line,) = [line for line in text.splitlines() if "OpenFlamingo" in line]
    assert line.endswith(f"mlp.gelu, must be {name}")


def test_v4_folder_loads_as_the_same_tower(demo, tmp_path, capsys):
    assert main(["export", demo, "--to", "v4", "--output", str(tmp_path / "tower")]) == 0
    assert "mm_vision_tower" in capsys.readouterr().out
    tower, info = CLIPVisionModel.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert not info["missing_keys"]
    wanted = CLIPModel.from_pretrained(demo).vision_model.state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in tower.state_dict().items())


@pytest.fixture
def vision_folder(tmp_path, demo):
    """A vision half without a projection, as `CLIPVisionModel` saves it; of other sizes than the class's defaults."""
    make_clip().vision_model.save_pretrained(tmp_path / "half")
    AutoImageProcessor.from_pretrained(demo).save_pretrained(tmp_path / "half")
    return str(tmp_path / "half")


def test_vision_half_is_exported_to_v4_with_its_own_weights(vision_folder, tmp_path):
    assert main(["export", vision_folder, "--to", "v4", "--output", str(tmp_path / "tower")]) == 0
    wanted = make_clip().vision_model.state_dict()
    tower = CLIPVisionModel.from_pretrained(tmp_path / "tower").state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in tower.items())


def test_vision_half_without_projection_is_no_open_clip_tower(vision_folder, tmp_path, capsys):
    assert main(["export", vision_folder, "--to", "open_clip", "--output", str(tmp_path / "tower.pt")]) == 1
    assert "has no projection" in capsys.readouterr().err
    assert not (tmp_path / "tower.pt").exists()


def test_vision_half_with_projection_is_exported_whole(demo, tmp_path):
    config = CLIPConfig.from_pretrained(demo)
    config.vision_config.projection_dim = config.projection_dim
    half = CLIPVisionModelWithProjection.from_pretrained(demo, config=config.vision_config)
    half.save_pretrained(tmp_path / "half")
    for folder, name in ((demo, "whole.pt"), (str(tmp_path / "half"), "half.pt")):
        assert main(["export", folder, "--to", "open_clip", "--output", str(tmp_path / name)]) == 0
    whole, half = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "half.pt"))
    assert whole.keys() == half.keys()
    assert all(torch.equal(whole[name], half[name]) for name in whole)


def test_base_without_text_tower_is_refused(demo, vision_folder, tmp_path, capsys):
    main(["export", demo, "--to", "open_clip", "--output", str(tmp_path / "tower.pt")])
    command = ["convert", str(tmp_path / "tower.pt"), "--base", vision_folder, "--output", str(tmp_path / "model")]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "holds a 'clip_vision_model' model" in said
    assert "wanted a CLIPModel." in said
    assert not (tmp_path / "model").exists()


def test_folder_that_lacks_weights_is_refused(demo, tmp_path, capsys):
    model = CLIPModel.from_pretrained(demo)
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path / "partial", state_dict=state)
    for target in ("open_clip", "v4"):
        assert main(["export", str(tmp_path / "partial"), "--to", target, "--output", str(tmp_path / target)]) == 1
        assert "which would be left random" in capsys.readouterr().err
        assert not (tmp_path / target).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--hidden_act", "gelu"], "hidden_act='quick_gelu', wanted 'gelu'"),
        (["--num_attention_heads", "2"], "num_attention_heads=4, wanted 2"),
    ],
)
def test_another_setting_is_refused_and_nothing_written(demo, tmp_path, capsys, change, message):
    main(["export", demo, "--to", "open_clip", "--output", str(tmp_path / "tower.pt")])
    output = tmp_path / "model"
    command = ["convert", str(tmp_path / "tower.pt"), "--base", demo, "--output", str(output), *change]
    assert main(command) == 1
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_other_depth_is_refused(demo, tmp_path, capsys):
    main(["export", demo, "--to", "open_clip", "--output", str(tmp_path / "tower.pt")])
    weights = torch.load(tmp_path / "tower.pt", weights_only=True)
    weights = {name: value for name, value in weights.items() if "resblocks.3" not in name}
    torch.save(weights, tmp_path / "tower.pt")
    assert main(["convert", str(tmp_path / "tower.pt"), "--base", demo, "--output", str(tmp_path / "model")]) == 1
    assert "num_hidden_layers is 4 in the tower and 3 in the source" in capsys.readouterr().err


def test_unknown_method_is_refused(capsys):
    assert main(["harden", "no-such-method"]) == 2
    assert "sim-clip" in capsys.readouterr().err
