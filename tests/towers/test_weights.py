"""Weights are read in one place: the whole model of finite floats, or one line that names the file."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel

from hf_robust_vision import load_robust_encoder
from hf_robust_vision.swap import load_source, load_state_dict
from hf_robust_vision.swap.convert import export_open_clip, export_v4
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.processors import load_image_processor, load_tokenizer
from hf_robust_vision.towers.text_bank import make_text_bank
from hf_robust_vision.towers.weights import load_pretrained, local_or_hub


WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"


@pytest.fixture
def folder(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "clip")


def change(folder, edit, name="model.safetensors"):
    weights = load_file(folder / name)
    edit(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


def settings(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"] |= values
    path.write_text(json.dumps(config))


# Every way in: what one of them refuses, all refuse.
DOORS = {
    "load_encoder": load_encoder,
    "load_source": load_source,
    "open_clip": lambda folder: export_open_clip(str(folder), folder / "tower.pt"),
    "v4": lambda folder: export_v4(str(folder), folder / "v4"),
}
doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def loralib(weights):
    weights[WEIGHT.replace("weight", "lora_A")] = torch.ones(2, 32)
    weights[WEIGHT.replace("weight", "lora_B")] = torch.ones(64, 2)


UNKNOWN = {"loralib": loralib, "a gate": lambda weights: weights.update({"vision_model.gate": torch.ones(1)})}


@doors
@pytest.mark.parametrize("edit", UNKNOWN.values(), ids=UNKNOWN)
def test_unknown_keys_are_refused(door, edit, folder):
    """findings-swap 3: they were dropped, and the plain base went in."""
    change(folder, edit)
    with pytest.raises(ValueError, match=r"weights that the CLIPModel of its config has no place for"):
        door(folder)
    assert {path.name for path in folder.iterdir()} & {"tower.pt", "v4"} == set()


@doors
def test_layers_beyond_the_config_are_refused(door, folder):
    """findings-swap 3: six layers under a config of four were cut without a word."""
    settings(folder, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"holds 16 weights.*vision_model\.encoder\.layers\.1\..*num_hidden_layers"):
        door(folder)


@doors
def test_another_shape_is_refused(door, folder):
    settings(folder, intermediate_size=48)
    with pytest.raises(ValueError, match=r"lacks 6 weights of the CLIPModel.*mlp\.fc1"):
        door(folder)


def test_buffers_of_old_versions_are_no_unknown_weights(folder):
    change(folder, lambda weights: weights.update({"vision_model.embeddings.position_ids": torch.arange(17)[None]}))
    assert torch.equal(load_encoder(folder).logit_scale, CLIPModel.from_pretrained(folder).logit_scale)


def test_the_text_half_may_lie_beside_a_vision_tower(folder):
    """The tower is whole, and `CLIPVisionModel` has no place for the rest of a CLIP."""
    with pytest.raises(ValueError, match="no place for"):
        load_pretrained(CLIPVisionModel, str(folder))
    load_pretrained(CLIPVisionModel, str(folder), unread=("text_", "logit_scale", "visual_projection"))


# -- not finite ------------------------------------------------------------------------------------------------------


def put(key, value):
    def edit(weights):
        weights[key].view(-1)[0] = value

    return edit


NOT_FINITE = {
    "vision": put(WEIGHT, math.nan),
    "text": put(WEIGHT.replace("vision", "text"), math.nan),
    "infinite": put("visual_projection.weight", -math.inf),
    "logit_scale": put("logit_scale", math.nan),
}


@doors
@pytest.mark.parametrize("edit", NOT_FINITE.values(), ids=NOT_FINITE)
def test_a_model_that_is_not_finite_is_refused(door, edit, folder):
    """findings-reliability 3, findings-swap 8: it answered class 0, and that counted as robust."""
    change(folder, edit)
    with pytest.raises(ValueError, match=r"model\.safetensors holds NaN or infinity in "):
        door(folder)


@doors
def test_a_logit_scale_that_overflows_is_refused(door, folder):
    """findings-reliability 3: exp(90) is infinite in float32."""
    change(folder, put("logit_scale", 90))
    with pytest.raises(ValueError, match=r"logit_scale 90, whose exponential overflows in torch\.float32"):
        door(folder)


def test_a_logit_scale_that_overflows_in_half_precision_only(folder):
    change(folder, put("logit_scale", 12))
    load_encoder(folder)
    load_encoder(folder, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"overflows in torch\.float16"):
        load_encoder(folder, dtype=torch.float16)


def test_weights_that_overflow_in_the_dtype_asked_for(folder):
    change(folder, put(WEIGHT, 1e6))
    load_encoder(folder)
    with pytest.raises(ValueError, match=rf"{WEIGHT} of .* overflows in torch\.float16: take bfloat16 or float32"):
        load_encoder(folder, dtype=torch.float16)


def test_activations_that_overflow_in_half_precision(folder):
    """Every weight is finite, what the layers compute is not."""

    def edit(weights):
        weights["vision_model.pre_layrnorm.weight"].fill_(6e4)
        weights["vision_model.pre_layrnorm.bias"].fill_(6e4)

    change(folder, edit)
    load_encoder(folder)
    with pytest.raises(ValueError, match=r"overflows in torch\.float16: load it in bfloat16 or float32"):
        load_encoder(folder, dtype=torch.float16)


@doors
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_quantised_weights_are_refused(door, dtype, folder):
    """findings-swap 8: whole numbers were taken for the weights that they stand for."""
    change(folder, lambda weights: weights.update({WEIGHT: weights[WEIGHT].to(dtype)}))
    with pytest.raises(ValueError, match=rf"{WEIGHT} as {dtype}: dequantise it first"):
        door(folder)


@doors
def test_float64_that_overflows_in_float32(door, folder):
    """findings-swap 8. The dtype "auto" is the one that the config tells."""
    change(folder, lambda weights: weights.update({WEIGHT: weights[WEIGHT].double() * 1e300}))
    with pytest.raises(ValueError, match=rf"{WEIGHT} of .* overflows in torch\.float32"):
        door(folder)


# -- files -----------------------------------------------------------------------------------------------------------


class Other:
    """An object that only code can unpickle."""


def damage(path, how):
    whole = path.read_bytes() if path.is_file() else b""
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "pointer":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_bytes(b"<!DOCTYPE html>\n" * 9)
    else:
        path.write_bytes(pickle.dumps({"model": Other()}))


DAMAGE = {
    "truncated": "is damaged or cut off: download it again",
    "empty": "(is empty|is damaged or cut off): download it again",
    "pointer": "only git LFS's pointer to the weights: fetch them with `git lfs pull`",
    "text": "(is not a file that torch.save wrote|is damaged or cut off): download it again",
    "pickle": "(holds other objects than tensors|is damaged or cut off)",
}
damages = pytest.mark.parametrize("how", DAMAGE)


def one_line(error, file):
    text = str(error)
    assert file in text
    assert "\n" not in text
    assert "weights_only" not in text
    assert len(text) < 400


@doors
@damages
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_of_a_folder_is_named(door, how, name, folder):
    """findings-swap 14."""
    if name.endswith(".bin"):
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()
        load_encoder(folder)
    damage(folder / name, how)
    with pytest.raises(ValueError, match=DAMAGE[how]) as caught:
        door(folder)
    one_line(caught.value, name)


@damages
@pytest.mark.parametrize("name", ["tower.safetensors", "tower.pt", "tower.bin"])
def test_a_damaged_state_dict_is_named(how, name, clip_folder, tmp_path):
    """findings-swap 14."""
    weights = load_file(clip_folder / "model.safetensors")
    (save_file if name.endswith(".safetensors") else torch.save)(weights, tmp_path / name)
    assert load_state_dict(tmp_path / name).keys() == weights.keys()
    damage(tmp_path / name, how)
    with pytest.raises(ValueError, match=DAMAGE[how]) as caught:
        load_source(tmp_path / name)
    one_line(caught.value, name)


def test_damage_anywhere_in_a_file_is_one_line(clip_folder, tmp_path):
    """Cut at fifty places, and overwritten at fifty."""
    path = tmp_path / "tower.pt"
    torch.save(load_file(clip_folder / "model.safetensors"), path)
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:place])
        with pytest.raises(ValueError, match="download it again") as caught:
            load_state_dict(path)
        one_line(caught.value, path.name)
        path.write_bytes(whole[:place] + b"\xff" * 64 + whole[place + 64 :])
        try:
            load_state_dict(path)
        except ValueError as error:
            one_line(error, path.name)


def test_shards_are_read_and_a_missing_one_is_named(folder):
    model = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 2
    load_encoder(folder)
    change(folder, lambda weights: next(iter(weights.values())).fill_(math.nan), shards[1].name)
    with pytest.raises(ValueError, match=rf"{shards[1].name} holds NaN"):
        load_encoder(folder)
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks {shards[1].name}, which model\.safetensors\.index\.json names"):
        load_encoder(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json is no index of weights"):
        load_encoder(folder)


@pytest.mark.parametrize("key", ["model", "module", "state_dict", "model_state_dict"])
def test_containers_of_training_scripts(key, clip_folder, tmp_path):
    """findings-swap 14: `{"model": ...}` and `{"module": ...}` were an unclear error."""
    weights = load_file(clip_folder / "model.safetensors")
    torch.save({key: {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}, tmp_path / "a.pt")
    assert "visual_projection.weight" in load_source(tmp_path / "a.pt").state
    torch.save({"optimizer": {}, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"no weights in this state dict, only \['optimizer', 'epoch'\]"):
        load_source(tmp_path / "a.pt")


# -- names -----------------------------------------------------------------------------------------------------------

PATHS = ["./runs/clip", "../clip", "runs/of/mine", "runs\\clip", "~/no-such/clip", "runs/clpi", "/no/such/clip"]
READERS = {
    "load_encoder": load_encoder,
    "load_source": load_source,
    "load_tokenizer": load_tokenizer,
    "load_image_processor": load_image_processor,
    "load_robust_encoder": load_robust_encoder,
    "export": lambda name: export_v4(name, "v4"),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
@pytest.mark.parametrize("name", PATHS)
def test_a_mistyped_path_does_not_go_to_the_hub(reader, name, tmp_path, monkeypatch):
    """findings-journey 8: it was asked for five times there."""

    def asked(*_args, **_kwargs):
        raise AssertionError("the Hub was asked")

    (tmp_path / "runs" / "clip-b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for place in ("transformers.utils.hub.hf_hub_download", "hf_robust_vision.hub.load.snapshot_download"):
        monkeypatch.setattr(place, asked)
    with pytest.raises(ValueError, match="no such folder: ") as caught:
        reader(name)
    one_line(caught.value, name)


def test_a_path_near_by_is_offered(tmp_path, monkeypatch):
    (tmp_path / "runs" / "sim-clip").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"no such folder: runs/simclip; did you mean {Path('runs/sim-clip')}\?"):
        local_or_hub("runs/simclip")
    assert local_or_hub("runs/sim-clip") == str(tmp_path / "runs" / "sim-clip")
    assert local_or_hub("openai/clip-vit-base-patch32") == "openai/clip-vit-base-patch32"
    assert local_or_hub("gpt2") == "gpt2"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_or_hub("~/runs/sim-clip") == str(tmp_path / "runs" / "sim-clip")


def test_a_file_where_a_folder_is_wanted(folder):
    with pytest.raises(ValueError, match=r"model\.safetensors is a file; wanted a model's folder or Hub id"):
        load_encoder(folder / "model.safetensors")


def test_a_text_bank_that_is_not_finite_is_refused(encoder, processor):
    """findings-reliability 3, of a model in memory: every image would be of class 0."""
    broken = copy.deepcopy(encoder)
    broken.text_model.final_layer_norm.weight.data[0] = math.nan
    large = copy.deepcopy(encoder)
    large.logit_scale.data.fill_(90)
    make_text_bank(encoder, processor.tokenizer, ["red", "green"], ["a photo of a {}"])
    for model in (broken, large):
        with pytest.raises(ValueError, match="not finite: every image would be class 0"):
            make_text_bank(model, processor.tokenizer, ["red", "green"], ["a photo of a {}"])
