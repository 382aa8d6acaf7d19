"""An adapter is merged whole, changes the vision tower, and belongs to its record; anything else is refused."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from hf_robust_vision import load_encoder, load_robust_encoder, merge_adapter
from hf_robust_vision.evaluation.results import RobustnessResult, save_results
from hf_robust_vision.swap import load_source
from hf_robust_vision.swap.convert import export_open_clip, export_v4
from hf_robust_vision.towers.adapters import merge_into
from hf_robust_vision.towers.base import weights_sha256


VISION = r"vision_model\..*\.(q_proj|v_proj)"


def make_adapter(base, folder, pattern=VISION, **settings):
    config = peft.LoraConfig(target_modules=pattern, r=2, **({"init_lora_weights": False} | settings))
    torch.manual_seed(3)
    model = peft.get_peft_model(CLIPModel.from_pretrained(base), config)
    model.save_pretrained(folder)
    return weights_sha256(model.merge_and_unload())


def record(folder, sha256, model="after", dtype="float32"):
    attack = {"name": "apgd-ce", "steps": 3, "dtype": dtype}
    return RobustnessResult(
        task="zero_shot", model=model, model_sha256=sha256, dataset="d", split="test", num_samples=2,
        clean_accuracy=1.0, robust_accuracy=0.5, protocol="apgd-ce", eps=1 / 255, norm="linf", attacks=[attack],
        ci95={"clean_accuracy": [0.3, 1.0], "robust_accuracy": [0.1, 0.9]},
    )  # fmt: skip


@pytest.fixture
def adapter(clip_folder, tmp_path):
    folder = tmp_path / "lora"
    save_results([record(folder, make_adapter(clip_folder, folder))], folder)
    return folder


def misspelt(weights):
    return {key.replace("lora_A", "lora_a"): value for key, value in weights.items()}


def of_a_vision_class(weights):
    return {key.replace("model.vision_model.", "model."): value for key, value in weights.items()}


def surplus(weights):
    more = {key.replace("layers.1.", f"layers.{i}."): v for i in (2, 3) for key, v in weights.items()}
    return more | weights


def one_layer(weights):
    return {key: value for key, value in weights.items() if "layers.0." in key}


BROKEN = {
    "misspelt": (misspelt, "missing adapter keys: .*, .* unknown adapter keys"),
    "of a vision class": (of_a_vision_class, "missing adapter keys"),
    "empty": (lambda weights: {}, "8 missing adapter keys"),
    "surplus layers": (surplus, "8 unknown adapter keys"),
    "fewer layers": (one_layer, "4 missing adapter keys"),
    "another rank": (lambda weights: {k: v[:1] if "lora_A" in k else v for k, v in weights.items()}, "another shape"),
    "all zero": (lambda weights: {k: torch.zeros_like(v) for k, v in weights.items()}, "stays as it was"),
    "B zero": (lambda w: {k: torch.zeros_like(v) if "_B" in k else v for k, v in w.items()}, "stays as it was"),
    "NaN": (lambda weights: {k: v * float("nan") for k, v in weights.items()}, "holds NaN or infinity"),
}
DOORS = {"merge_adapter": merge_adapter, "load_source": load_source, "load_robust_encoder": load_robust_encoder}
doors = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


@doors
@pytest.mark.parametrize("case", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused(door, case, adapter):
    """findings-swap 1 and 4: the undefended model was given as robust; surplus keys were dropped."""
    change, words = BROKEN[case]
    door(adapter)
    path = adapter / "adapter_model.safetensors"
    save_file({key: value.clone().contiguous() for key, value in change(load_file(path)).items()}, path)
    with pytest.raises(ValueError, match=words):
        door(adapter)


@doors
def test_narrowed_target_modules_are_refused(door, adapter):
    """findings-swap 4: the adapter was merged in part."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = r"vision_model\..*\.q_proj"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit .*4 unknown adapter keys"):
        door(adapter)


@doors
def test_an_adapter_of_the_text_tower_alone_is_refused(door, clip_folder, tmp_path):
    """findings-swap 1: its vision tower is the undefended one."""
    folder = tmp_path / "text"
    sha256 = make_adapter(clip_folder, folder, r"text_model\..*\.q_proj")
    save_results([record(folder, sha256)], folder)
    with pytest.raises(ValueError, match="another part.*stays as it was"):
        door(folder)


CONFIGS = {
    "{}": "does not tell the peft_type",
    "[]": "adapter_config.json of .* can not be read",
    "{": "adapter_config.json of .* can not be read",
    '{"peft_type": "FOO"}': "adapter_config.json of .* can not be read",
    '{"peft_type": "LORA"}': "does not name the model that it was trained on: pass base=",
    '{"peft_type": "LORA", "base_model_name_or_path": "/no/such/clip"}': "not here: pass base=.*no such folder",
}


@doors
@pytest.mark.parametrize("text", CONFIGS)
def test_a_config_that_is_none(door, text, adapter):
    """findings-swap 14."""
    (adapter / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=CONFIGS[text]):
        door(adapter)


def test_an_adapter_without_weights(adapter, clip_folder):
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        merge_adapter(clip_folder)
    (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="adapter_model.safetensors is only git LFS's pointer"):
        merge_adapter(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no adapter_model.safetensors"):
        merge_adapter(adapter)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"bias": "lora_only"}, {"use_rslora": True}], ids=str)
def test_other_kinds_of_lora_are_merged(settings, clip_folder, tmp_path):
    wanted = make_adapter(clip_folder, tmp_path / "lora", **settings)
    assert weights_sha256(merge_adapter(tmp_path / "lora")) == wanted


def test_a_pickled_adapter_of_tensors_is_merged(clip_folder, tmp_path):
    """As peft wrote them before it knew safetensors."""
    wanted = make_adapter(clip_folder, tmp_path / "lora")
    weights = tmp_path / "lora" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert weights_sha256(merge_adapter(tmp_path / "lora")) == wanted


def test_prompt_tuning_is_no_adapter_of_weights(clip_folder, adapter):
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "base_model_name_or_path": str(clip_folder)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit"):
        merge_into(load_encoder(clip_folder), adapter, part=[])


BOTH = {
    "load_encoder": load_encoder,
    "open_clip": lambda folder: export_open_clip(str(folder), folder / "out"),
    "v4": lambda folder: export_v4(str(folder), folder / "out"),
}


@pytest.mark.parametrize("door", (DOORS | BOTH).values(), ids=DOORS | BOTH)
def test_a_folder_with_a_model_and_an_adapter_is_refused(door, adapter, clip_folder):
    """findings-swap 5: `export` wrote `base_layer` and `lora_A` keys, swap took another model than the folder's."""
    for path in clip_folder.iterdir():
        shutil.copy(path, adapter)
    with pytest.raises(ValueError, match=r"holds a model \(model.safetensors\) and an adapter .*move the adapter to"):
        door(adapter)
    assert not (adapter / "out").exists()


@pytest.mark.parametrize("door", BOTH.values(), ids=BOTH)
def test_an_adapter_alone_is_no_model(door, adapter):
    with pytest.raises(ValueError, match=r"is a PEFT adapter of .*merge_adapter"):
        door(adapter)


def test_an_adapter_on_another_original_than_its_record_is_refused(adapter, clip_folder, tmp_path):
    """findings-swap 2: the record holds the original's measurement, so the original's weights are known."""
    after = record(adapter, weights_sha256(merge_adapter(adapter)))
    before = weights_sha256(load_encoder(clip_folder))
    save_results([record(adapter, before, "before"), after], adapter)
    load_robust_encoder(adapter)
    other = shutil.copytree(clip_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["vision_model.encoder.layers.0.mlp.fc1.bias"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(other)}))
    with pytest.raises(ValueError, match="was trained on another model than .*other is now"):
        load_robust_encoder(adapter)
    save_results([record(adapter, before, "before", "bfloat16"), after], adapter)  # another hash by its dtype alone
    with pytest.warns(UserWarning, match="not bit for bit"):
        load_robust_encoder(adapter)
