"""A model between two others."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel, CLIPProcessor

from hf_robust_vision import as_encoder, interpolate, interpolate_encoders, load_encoder
from hf_robust_vision.cli import main
from hf_robust_vision.towers.base import tensor_sha256, weights_sha256
from tests.conftest import build_clip, build_processor
from tests.towers.zoo import saved, tiny_processor


def moved(model, seed=1):
    """The same with other weights, a negative zero among them."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.view(-1)[0] = -0.0
    return other


@pytest.fixture(params=["clip", "siglip"])
def pair(request, clip_folder, siglip_folder, tmp_path):
    """Folders of an original and of a hardened model."""
    original = {"clip": clip_folder, "siglip": siglip_folder}[request.param]
    moved(load_encoder(original)).save_pretrained(tmp_path / "hardened")
    AutoProcessor.from_pretrained(original).save_pretrained(tmp_path / "hardened")
    return original, tmp_path / "hardened"


def bits(folder):
    return {name: tensor_sha256(value) for name, value in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_ends_are_exact(weight, pair, tmp_path):
    folder = interpolate(*pair, tmp_path / "end", weight=weight)
    wanted, found = bits(pair[int(weight)]), bits(folder)
    assert found == wanted


def test_between_is_the_straight_line_and_stock(pair, tmp_path, capsys):
    words = ["interpolate", *map(str, pair), "--weight", "0.7", "--output_dir", str(tmp_path / "between")]
    assert main(words) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"next: hf-robust-vision evaluate {tmp_path / 'between'}"
    assert str(tmp_path / "between" / "interpolate_report.json") in said[-2]
    first, last, found = (load_file(place / "model.safetensors") for place in (*pair, tmp_path / "between"))
    for name, value in found.items():
        torch.testing.assert_close(value, 0.3 * first[name] + 0.7 * last[name])
    stock = type(load_encoder(pair[0])).stock_class
    _, info = stock.from_pretrained(tmp_path / "between", output_loading_info=True)
    assert not info["missing_keys"]
    assert type(AutoProcessor.from_pretrained(tmp_path / "between")) is type(AutoProcessor.from_pretrained(pair[0]))


def test_it_says_what_it_was_made_from(pair, tmp_path, capfd):
    """Parents and child by the hashes of their weights, in the folder and for a machine."""
    words = ["interpolate", *map(str, pair), "--weight", "0.25", "--output_dir", str(tmp_path / "between"), "--json"]
    assert main(words) == 0
    told = json.loads(capfd.readouterr().out)
    record = json.loads((tmp_path / "between" / "interpolate_report.json").read_text())
    assert told == record | {"output_dir": str(tmp_path / "between")}
    assert [record[name]["model"] for name in ("original", "hardened")] == [place.name for place in pair]
    wanted = [weights_sha256(load_encoder(place)) for place in (*pair, tmp_path / "between")]
    assert [record["original"]["sha256"], record["hardened"]["sha256"], record["sha256"]] == wanted
    assert (record["weight"], record["vlm"]) == (0.25, False)


def test_both_stay_as_they_are(encoder):
    other = moved(encoder)
    states = [copy.deepcopy(each.state_dict()) for each in (encoder, other)]
    mixed = interpolate_encoders(encoder, other, 0.5)
    with torch.no_grad():
        for parameter in mixed.parameters():
            parameter.zero_()
    for each, state in zip((encoder, other), states):
        assert all(torch.equal(value, state[name]) for name, value in each.state_dict().items())


def test_the_wider_precision_is_kept(encoder):
    """An original of bfloat16 and its hardened float32 model: the original's values at 0, in float32."""
    half = copy.deepcopy(encoder).to(torch.bfloat16)
    mixed = interpolate_encoders(half, moved(encoder), 0.0)
    assert {value.dtype for value in mixed.state_dict().values()} == {torch.float32}
    assert all(torch.equal(value, mixed.state_dict()[name].bfloat16()) for name, value in half.state_dict().items())


def test_a_bare_tower(clip_folder, tmp_path):
    tower = load_encoder(clip_folder).vision_half()
    for name, model in (("one", tower), ("two", moved(tower))):
        model.save_pretrained(tmp_path / name)
        build_processor().image_processor.save_pretrained(tmp_path / name)
    folder = interpolate(tmp_path / "one", tmp_path / "two", tmp_path / "new", weight=0.5)
    assert load_encoder(folder).state_dict().keys() == load_encoder(tmp_path / "one").state_dict().keys()


def test_a_vlm_and_the_one_that_was_hardened(tmp_path):
    """Tower and projector are between; the language model is the same, and copied."""
    _, images = saved("llava", tmp_path / "vlm")
    tiny_processor("llava", images).save_pretrained(tmp_path / "vlm")
    moved(load_encoder(tmp_path / "vlm")).save_pretrained(tmp_path / "hardened")
    folder = interpolate(tmp_path / "vlm", tmp_path / "hardened", tmp_path / "new", weight=0.25)
    first, last, found = (
        load_file(place / "model.safetensors") for place in (tmp_path / "vlm", tmp_path / "hardened", folder)
    )
    own = {name for name in first if not torch.equal(first[name], last[name])}
    assert own
    assert own != set(first)
    for name, value in found.items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * last[name])
        assert name in own or torch.equal(value, first[name])
    AutoModelForImageTextToText.from_pretrained(folder)
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "hardened")
    moved(whole).save_pretrained(tmp_path / "other")
    for file in (tmp_path / "vlm").iterdir():
        if not (tmp_path / "other" / file.name).exists():
            shutil.copyfile(file, tmp_path / "other" / file.name)
    with pytest.raises(ValueError, match="language models of .* differ: name the VLM that was hardened"):
        interpolate(tmp_path / "vlm", tmp_path / "other", tmp_path / "never", weight=0.5)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("turned", [False, True])
def test_two_classes_one_of_them_a_vlm(turned, clip_folder, tmp_path):
    """Before their language models are asked for: a CLIP has none, and those of two classes are no question."""
    for family in ("llava", "smolvlm"):
        saved(family, tmp_path / family)
    for others, names in (((clip_folder, tmp_path / "llava"), ("CLIPModel", "LlavaForConditionalGeneration")),
                          ((tmp_path / "smolvlm", tmp_path / "llava"),
                           ("SmolVLMForConditionalGeneration", "LlavaForConditionalGeneration"))):  # fmt: skip
        step = -1 if turned else 1
        one, other = names[::step]
        with pytest.raises(ValueError, match=f"nothing between a {one} and a {other}; name the model that"):
            interpolate(*others[::step], tmp_path / "never", weight=0.5)
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan"), float("inf")])
def test_no_share(weight, encoder):
    with pytest.raises(ValueError, match="weight must be at least 0"):
        interpolate_encoders(encoder, encoder, weight)


def test_no_pair(encoder, clip_folder, siglip_folder, tmp_path):
    with pytest.raises(ValueError, match="nothing between a CLIPModel and a SiglipModel"):
        interpolate(clip_folder, siglip_folder, tmp_path / "never", weight=0.5)
    act = build_clip()
    act.config.vision_config.hidden_act = "relu"
    with pytest.raises(
        ValueError, match="vision_config.hidden_act is quick_gelu in the original and relu in the hard"
    ):
        interpolate_encoders(encoder, as_encoder(act, build_processor()), 0.5)
    other = build_processor()
    other.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(ValueError, match="images is PixelTransform.* they are no pair"):
        interpolate_encoders(encoder, as_encoder(build_clip(), other), 0.5)
    with pytest.raises(ValueError, match=r"text_config.vocab_size is 40 .* 41 "):
        interpolate_encoders(encoder, as_encoder(build_clip(vocabulary=41), build_processor()), 0.5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("work")
    with pytest.raises(ValueError, match="full is there already; name another --output_dir"):
        interpolate(clip_folder, clip_folder, tmp_path / "full", weight=0.5)
    assert not (tmp_path / "never").exists()


def test_a_folder_by_transformers_alone(clip_folder, tmp_path):
    folder = interpolate(clip_folder, clip_folder, tmp_path / "same", weight=0.5)
    found = CLIPModel.from_pretrained(folder).state_dict()
    wanted = CLIPModel.from_pretrained(clip_folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert type(CLIPProcessor.from_pretrained(folder)) is CLIPProcessor


def test_the_verb_knows_the_shipped_models(tmp_path):
    assert (
        main(["interpolate", "demo-clip", "demo-clip", "--weight", "0.5", "--output_dir", str(tmp_path / "mixed")])
        == 0
    )
    assert (tmp_path / "mixed" / "model.safetensors").is_file()
