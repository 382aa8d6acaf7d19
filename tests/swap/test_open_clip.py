import functools
import zipfile

import pytest
import torch
from lookalikes import Flamingo, QuickGELU, VisionTransformer
from safetensors.torch import save_file
from tiny_vlms import SIZE, make_clip, randomise
from torch import nn
from transformers import CLIPVisionModelWithProjection

from hf_robust_vision.swap import find_towers, hf_to_openclip, load_state_dict, openclip_to_hf, swap_vision_encoder
from hf_robust_vision.towers.base import weights_sha256


ACTS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}
PIXELS = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def lookalike(act, seed=5):
    torch.manual_seed(seed)
    return randomise(VisionTransformer(act=ACTS[act]), seed)


def real(act, seed=5):
    open_clip = pytest.importorskip("open_clip")
    from open_clip.transformer import QuickGELU as RealQuickGELU

    acts = {"quick_gelu": RealQuickGELU, "gelu": nn.GELU}
    tower = open_clip.transformer.VisionTransformer(
        image_size=SIZE, patch_size=8, width=32, layers=4, heads=4, mlp_ratio=1.5, output_dim=24,
        act_layer=acts[act], output_tokens=True,
    )  # fmt: skip
    tower.final_ln_after_pool = True  # tokens before the last norm, which OpenFlamingo was trained with
    return randomise(tower, seed)


both_acts = pytest.mark.parametrize("act", list(ACTS))
both_towers = pytest.mark.parametrize("make", [lookalike, real])


def to_hf(tower, act):
    state = openclip_to_hf(tower.state_dict())
    model = CLIPVisionModelWithProjection(make_clip(hidden_act=act).config.vision_config).eval()
    projection = {"visual_projection.weight": state.pop("visual_projection.weight")}
    model.load_state_dict({f"vision_model.{key}": value for key, value in state.items()} | projection, strict=True)
    return model


@torch.no_grad()
def difference(openclip, hf):
    pooled, tokens = openclip(PIXELS)
    output = hf(PIXELS)
    return max(
        float((output.image_embeds - pooled).abs().max() / pooled.abs().max()),
        float((output.last_hidden_state[:, 1:] - tokens).abs().max() / tokens.abs().max()),
    )


@both_acts
@both_towers
def test_features_are_equal_both_ways(make, act):
    tower = make(act)
    assert difference(tower, to_hf(tower, act)) < 1e-5

    clip = make_clip(hidden_act=act)
    other = make(act, seed=6)
    other.load_state_dict(hf_to_openclip(clip.state_dict()), strict=True)
    vision = CLIPVisionModelWithProjection(clip.config.vision_config).eval()
    vision.load_state_dict({k: v for k, v in clip.state_dict().items() if k.startswith("vis")}, strict=True)
    assert difference(other, vision) < 1e-5


@both_towers
def test_the_activation_matters_although_the_keys_agree(make):
    tower = make("gelu")
    assert difference(tower, to_hf(tower, "quick_gelu")) > 1e-3


@both_towers
def test_the_round_trip_is_bit_equal(make):
    state = make("gelu").state_dict()
    again = hf_to_openclip(openclip_to_hf(state))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_containers_and_prefixes():
    state = lookalike("gelu").state_dict()
    wanted = openclip_to_hf(state)
    text = {
        "transformer.resblocks.0.ln_1.weight": torch.ones(3),
        "logit_scale": torch.ones(()),
        "input_resolution": 224,
    }

    def prefixed(prefix):
        return {prefix + key: value for key, value in state.items()}

    for container in (
        {"vision_encoder_state_dict": state, "step": 3},
        {"state_dict": {**prefixed("module.visual."), **text}, "epoch": 1},
        {**prefixed("visual."), **text},
        prefixed("module."),
        prefixed("model."),
        prefixed("model.visual."),
        prefixed("vision_encoder."),
    ):
        got = openclip_to_hf(container)
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"attn_pool.query": 1}, "attn_pool.query"),
        ({"transformer.resblocks.0.ls_1.gamma": 1}, "ls_1.gamma"),
        ({"other.class_embedding": 1}, r"found 2 \('', 'other.'\)"),
    ],
)
def test_unknown_keys_are_refused(extra, words):
    state = lookalike("gelu").state_dict() | dict.fromkeys(extra, torch.ones(1))
    with pytest.raises(ValueError, match=words):
        openclip_to_hf(state)


def test_other_networks_are_refused_by_name():
    with pytest.raises(ValueError, match="ResNet"):
        openclip_to_hf({"visual.layer1.0.conv1.weight": torch.ones(1)})
    with pytest.raises(ValueError, match="timm"):
        openclip_to_hf({"visual.trunk.cls_token": torch.ones(1)})
    with pytest.raises(ValueError, match=r"0 unknown keys .*1 missing keys .*ln_pre"):
        openclip_to_hf({k: v for k, v in lookalike("gelu").state_dict().items() if k != "ln_pre.bias"})


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files(name, tmp_path, llava):
    path = tmp_path / name
    state = lookalike("quick_gelu").state_dict()
    save_file(state, path) if name.endswith("safetensors") else torch.save({"state_dict": state}, path)
    report = swap_vision_encoder(llava, path)
    assert report.source == name
    assert any("hidden_act='quick_gelu'" in warning and "bare state dict" in warning for warning in report.warnings)
    with torch.no_grad():
        tokens = lookalike("quick_gelu")(PIXELS)[1]
        got = llava.model.vision_tower(PIXELS).last_hidden_state[:, 1:]
    torch.testing.assert_close(got, tokens, rtol=1e-5, atol=1e-5)


def test_files_that_could_run_code_are_refused(tmp_path, llava):
    archive = tmp_path / "ViT-L-14.pt"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("ViT-L-14/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"TorchScript archive.*torch\.jit\.load"):
        swap_vision_encoder(llava, archive)
    pickled = tmp_path / "object.pt"
    torch.save({"model": functools.partial(print)}, pickled)
    with pytest.raises(ValueError, match="holds other objects than tensors"):
        load_state_dict(pickled)
    torch.save(torch.ones(1), pickled)
    with pytest.raises(ValueError, match="holds a Tensor; wanted a state dict"):
        load_state_dict(pickled)
    with pytest.raises(FileNotFoundError):
        swap_vision_encoder(llava, tmp_path / "absent.pt")


@both_acts
@both_towers
def test_swap_into_flamingo(make, act):
    vlm, clip = randomise(Flamingo(make(act)), 2), make_clip(hidden_act=act)
    before = weights_sha256(vlm)
    (tower,) = find_towers(vlm)
    assert (tower.path, tower.geometry.hidden_act, tower.geometry.image_size) == ("vision_encoder", act, SIZE)
    report = swap_vision_encoder(vlm, clip)
    assert report.towers[0].unread_names == ["proj"]
    assert report.towers[0].output_error < 1e-5
    with torch.no_grad():
        wanted = clip.vision_model(PIXELS).last_hidden_state[:, 1:]
        torch.testing.assert_close(vlm.vision_encoder(PIXELS)[1], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(vlm(PIXELS), vlm.perceiver(wanted), rtol=1e-5, atol=1e-5)
    assert torch.equal(vlm.vision_encoder.proj, clip.visual_projection.weight.T)
    report.restore()
    assert weights_sha256(vlm) == before


@both_towers
def test_flamingo_with_other_settings_or_without_a_projection(make):
    vlm = Flamingo(make("gelu"))
    before = weights_sha256(vlm)
    with pytest.raises(ValueError, match="pass hidden_act='quick_gelu'"):
        swap_vision_encoder(vlm, make_clip())
    with pytest.raises(ValueError, match="resize='native'"):
        swap_vision_encoder(vlm, make_clip(hidden_act="gelu", image_size=48), resize="native", processor=object())
    assert weights_sha256(vlm) == before
    projection = vlm.vision_encoder.proj.clone()
    source = make_clip(image_size=48, num_attention_heads=2).vision_model
    report = swap_vision_encoder(vlm, source, hidden_act="quick_gelu", num_attention_heads=2, resize="interpolate")
    assert report.towers[0].output_error < 1e-5
    assert torch.equal(vlm.vision_encoder.proj, projection)
    report.restore()
    assert weights_sha256(vlm) == before
    assert find_towers(vlm)[0].geometry.hidden_act == "gelu"


def test_mixed_precision_tower_keeps_its_dtypes():
    vlm = Flamingo(real("gelu"))
    for module in vlm.vision_encoder.modules():  # what open_clip's fp16 precision does
        if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention):
            module.bfloat16()
    vlm.vision_encoder.proj.data = vlm.vision_encoder.proj.data.bfloat16()
    from open_clip.transformer import LayerNormFp32

    for module in vlm.vision_encoder.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = LayerNormFp32
    dtypes = {name: weight.dtype for name, weight in vlm.named_parameters()}
    clip = make_clip(hidden_act="gelu")
    report = swap_vision_encoder(vlm, clip)
    assert {name: weight.dtype for name, weight in vlm.named_parameters()} == dtypes
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    assert torch.equal(vlm.vision_encoder.ln_pre.weight, clip.vision_model.pre_layrnorm.weight)
    assert report.towers[0].output_error < 0.05


@both_towers
def test_a_live_open_clip_tower_as_source_tells_its_settings(make, llava):
    with pytest.raises(ValueError, match="pass hidden_act='gelu'"):
        swap_vision_encoder(llava, make("gelu"))
    report = swap_vision_encoder(llava, make("quick_gelu"))
    assert not any("bare state dict" in warning for warning in report.warnings)
