"""Every refusal names what was got, what was wanted and what to type, and leaves the VLM bit for bit as it was."""

import accelerate
import peft
import pytest
import torch
import transformers as tf
from tiny_vlms import FAMILY, SIZE, logits, make_clip, vlm_inputs
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import CLIPImageProcessor

from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.swap import swap_vision_encoder
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.load import as_encoder


REFUSED = {
    "activation": ({"hidden_act": "gelu"}, {}, ["'quick_gelu'", "'gelu'", "pass hidden_act='gelu'"]),
    "heads": ({"num_attention_heads": 2}, {}, ["is 4", "and 2", "pass num_attention_heads=2"]),
    "eps": ({"layer_norm_eps": 1e-6}, {}, ["1e-05", "1e-06", "pass a state dict"]),
    "depth": ({"num_hidden_layers": 3}, {}, ["num_hidden_layers is 4", "and 3"]),
    "width": ({"hidden_size": 16}, {}, ["hidden_size is 32", "and 16"]),
    "mlp": ({"intermediate_size": 40}, {}, ["intermediate_size is 48", "and 40"]),
    "patch": ({"patch_size": 16}, {"resize": "interpolate"}, ["patch_size is 8", "and 16"]),
    "size": ({"image_size": 48}, {}, ["image_size is 32", "and 48", "resize='interpolate'", "resize='native'"]),
    "native without processor": ({"image_size": 48}, {"resize": "native"}, ["32 px to 48 px", "processor= is absent"]),
    "native with half a processor": (
        {"image_size": 48},
        {"resize": "native", "processor": CLIPImageProcessor()},
        ["32 px to 48 px", "processor= is CLIPImageProcessor"],
    ),
    "unknown activation": ({}, {"hidden_act": "glue"}, ["'glue'", "'quick_gelu'"]),
    "no heads": ({}, {"num_attention_heads": 0}, ["num_attention_heads=0"]),
    "resize": ({}, {"resize": "stretch"}, ["'stretch'", "'interpolate'"]),
    "towers": ({}, {"towers": "vision_tower"}, ["vision_tower", "['model.vision_tower']"]),
    "no towers": ({}, {"towers": []}, ["'model.vision_tower'"]),
    "heads that do not divide": ({}, {"num_attention_heads": 5}, ["num_attention_heads=5", "32"]),
    "base without adapter": ({}, {"base": "x"}, ["base= belongs to a PEFT adapter"]),
}


def assert_refused(vlm, source, words, error=ValueError, **options):
    before, config = weights_sha256(vlm), vlm.config.to_dict()
    with pytest.raises(error) as caught:
        swap_vision_encoder(vlm, source, **options)
    for word in words:
        assert word in str(caught.value)
    assert weights_sha256(vlm) == before
    assert vlm.config.to_dict() == config


@pytest.mark.parametrize("case", REFUSED)
def test_a_source_that_does_not_fit(case, llava):
    vision, options, words = REFUSED[case]
    inputs = vlm_inputs("llava")
    before = logits(llava, inputs)
    assert_refused(llava, make_clip(**vision), words, **options)
    assert torch.equal(logits(llava, inputs), before)


@pytest.mark.parametrize("name", FAMILY)
def test_every_family_is_left_as_it_was(name, vlm_of):
    assert_refused(vlm_of(name), make_clip(num_hidden_layers=5), ["num_hidden_layers is 4", "and 5"])


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video"])
def test_tiled_models_cannot_run_at_another_size(name, vlm_of):
    words = ["resize='native'", "resize='interpolate'", name]
    assert_refused(vlm_of(name), make_clip(image_size=48), words, resize="native", processor=object())


def test_offloaded_tower(llava, clip):
    before = weights_sha256(llava)
    accelerate.cpu_offload(llava.model.vision_tower)
    with pytest.raises(ValueError, match="meta device") as caught:
        swap_vision_encoder(llava, clip)
    assert "remove_hook_from_module" in str(caught.value)
    accelerate.hooks.remove_hook_from_module(llava.model.vision_tower, recurse=True)
    assert weights_sha256(llava) == before
    assert swap_vision_encoder(llava, clip).towers[0].changed > 0


def test_adapter_inside_the_tower(llava, clip):
    wrapped = peft.get_peft_model(llava, peft.LoraConfig(target_modules=r".*vision_tower.*\.v_proj"))
    assert_refused(wrapped, clip, ["merge_and_unload() or unload()", "vision_tower"])


def test_adapter_on_the_language_model_only(llava, clip):
    wrapped = peft.get_peft_model(llava, peft.LoraConfig(target_modules=r".*language_model.*\.v_proj"))
    report = swap_vision_encoder(wrapped, clip)
    assert report.towers[0].path == "base_model.model.model.vision_tower"
    assert llava.config.robust_vision_swap["towers"][0]["source"] == report.source


class PackedLinear(nn.Linear):
    """What a quantised layer looks like: packed integers in place of the weight."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        packed = torch.randint(0, 255, (linear.weight.numel() // 2, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


class GroupedLinear(nn.Module):
    """The other kind: buffers under other names."""

    def __init__(self, linear):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(linear.in_features, linear.out_features // 8, dtype=torch.int32))


@pytest.mark.parametrize(
    ("kind", "words"),
    [(PackedLinear, ["torch.uint8", "load the model in float"]), (GroupedLinear, ["missing weights", "Quantised"])],
)
def test_quantised_tower(kind, words, llava, clip):
    mlp = llava.model.vision_tower.encoder.layers[0].mlp
    mlp.fc1 = kind(mlp.fc1)
    assert_refused(llava, clip, words)


def test_cut_tower(llava, clip):
    tower = llava.model.vision_tower
    tower.encoder.layers = tower.encoder.layers[:-1]
    assert_refused(llava, clip, ["4 layers", "missing weights"])


def test_wrong_prefix_and_unknown_keys(llava, clip):
    state = clip.vision_model.state_dict()
    wrong = {key.replace("encoder.", "transformer."): value for key, value in state.items()}
    assert_refused(llava, wrong, ["unknown keys", "missing keys"])
    assert_refused(llava, {**state, "encoder.layers.0.gamma": torch.ones(1)}, ["1 unknown keys", "layers.0.gamma"])
    state.pop("encoder.layers.2.mlp.fc1.bias")
    assert_refused(llava, state, ["1 missing keys", "encoder.layers.2.mlp.fc1.bias"])
    assert_refused(llava, clip.text_model.state_dict(), ["found none"])
    assert_refused(llava, 3, ["int", "CLIP model"], error=TypeError)


def test_weights_that_are_not_finite(llava, clip):
    weight = clip.vision_model.encoder.layers[1].mlp.fc1.weight
    weight.data[0, 0] = 1e6
    assert_refused(
        llava.half(),
        clip,
        ["layers.1.mlp.fc1.weight of a CLIPModel in memory", "overflows", "torch.float16", "bfloat16"],
    )
    weight.data[0, 0] = float("nan")
    assert_refused(llava.float(), clip, ["NaN", "layers.1.mlp.fc1.weight"])


def test_source_that_is_quantised(llava, clip):
    state = clip.vision_model.state_dict()
    state["encoder.layers.0.mlp.fc1.weight"] = state["encoder.layers.0.mlp.fc1.weight"].to(torch.int8)
    assert_refused(llava, state, ["torch.int8", "dequantise"])


def test_tensor_subclass_in_the_tower(llava, clip):
    class Packed(torch.Tensor):
        pass

    fc1 = llava.model.vision_tower.encoder.layers[0].mlp.fc1
    fc1.weight = nn.Parameter(fc1.weight.detach().as_subclass(Packed))
    before = fc1.weight.detach().clone()
    with pytest.raises(ValueError, match=r"quantised or sharded .* is a Packed of"):
        swap_vision_encoder(llava, clip)
    assert torch.equal(fc1.weight.detach(), before)


SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SMALL, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VIT = {**SMALL, "image_size": 32, "patch_size": 8}


def llava_with(model_type):
    text = {"model_type": "llama", "num_key_value_heads": 2, **TEXT}
    config = tf.LlavaConfig(vision_config={"model_type": model_type, **VIT}, text_config=text)
    return tf.LlavaForConditionalGeneration(config)


def groupvit():
    groups = {"depths": [1, 1], "num_hidden_layers": 2, "num_group_tokens": [4, 2], "num_output_groups": [4, 2]}
    return tf.GroupViTModel(tf.GroupViTConfig(vision_config=VIT | groups, text_config=TEXT))


def xclip():
    vision = VIT | {f"mit_{key}": value for key, value in SMALL.items()}
    return tf.XCLIPModel(tf.XCLIPConfig(vision_config=vision, text_config=TEXT))


def eva():
    timm = pytest.importorskip("timm")
    model = nn.Module()
    model.vision_encoder = timm.models.eva.Eva(img_size=32, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    return model


OTHERS = {
    "SiglipVisionModel": lambda: llava_with("siglip_vision_model"),  # found, and told to be another family than a CLIP
    "Dinov2Model": lambda: llava_with("dinov2"),
    "PixtralVisionModel": lambda: llava_with("pixtral"),
    "InternVLVisionModel": lambda: llava_with("internvl_vision"),
    "OwlViTVisionTransformer": lambda: tf.OwlViTModel(tf.OwlViTConfig(vision_config=VIT, text_config=TEXT)),
    "BlipVisionModel": lambda: tf.BlipForConditionalGeneration(tf.BlipConfig(vision_config=VIT, text_config=TEXT)),
    "GroupViTVisionTransformer": groupvit,
    "XCLIPVisionModel": xclip,
    "Eva": eva,
    "MLCDVisionModel": lambda: tf.MLCDVisionModel(tf.MLCDVisionConfig(**VIT)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_kind_of_tower_is_refused_by_name(name, clip):
    model = OTHERS[name]()
    before = weights_sha256(model)
    with pytest.raises(ValueError, match=name):
        swap_vision_encoder(model, clip)
    assert weights_sha256(model) == before


def test_image_mean_and_std(llava, clip):
    half = (0.5, 0.5, 0.5)

    class Processor:
        image_mean, image_std = half, half

    same = as_encoder(clip, PixelTransform(SIZE, (SIZE, SIZE), half, half))
    assert "image mean and std equal" in swap_vision_encoder(llava, same, processor=Processor()).checks
    other = as_encoder(make_clip())
    assert_refused(llava, other, ["0.48145466", "(0.5, 0.5, 0.5)", "image_mean"], processor=Processor())


def test_processor_that_does_not_rescale(llava, clip, tmp_path):
    clip.save_pretrained(tmp_path)
    CLIPImageProcessor().save_pretrained(tmp_path)
    words = ["by 0.00392157", "the VLM's by 1:", "do_rescale"]
    assert_refused(llava, tmp_path, words, processor=CLIPImageProcessor(do_rescale=False))
    assert_refused(llava, tmp_path, ["(1.0, 1.0, 1.0)"], processor=CLIPImageProcessor(do_normalize=False))


def test_other_resize_and_size_of_the_processor_are_told(llava, clip, tmp_path):
    """They do not keep the swap from being right."""
    clip.save_pretrained(tmp_path)
    CLIPImageProcessor(crop_size=SIZE).save_pretrained(tmp_path)
    swap_vision_encoder(llava, tmp_path)  # from here on the tower is no stranger
    same = swap_vision_encoder(llava, tmp_path, processor=CLIPImageProcessor(crop_size=SIZE))
    assert same.warnings == []
    other = swap_vision_encoder(llava, tmp_path, processor=CLIPImageProcessor(crop_size=48, resample=2))
    assert other.warnings == [
        "images are resized with resample=2 (PIL's code) by the processor, with 3 by the source's.",
        f"the processor makes images of 48 x 48 pixels, the tower takes {SIZE} x {SIZE}.",
    ]
    encoder = as_encoder(clip, PixelTransform(SIZE, (SIZE, SIZE), mode="bilinear"))
    (warning,) = swap_vision_encoder(llava, encoder, processor=CLIPImageProcessor(crop_size=SIZE)).warnings
    assert "with 2 by the source's" in warning


def test_settings_that_towers_share(vlm_of):
    options = {"hidden_act": "gelu", "towers": ["model.image_tower"]}
    words = ["hidden_act", "model.video_tower", "towers='all'"]
    assert_refused(vlm_of("video_llava"), make_clip(hidden_act="gelu"), words, **options)


def test_failed_verification_brings_the_old_tower_back(llava, clip):
    llava.model.vision_tower.encoder.layers[2].mlp.register_forward_hook(lambda *call: 1.2 * call[2])
    assert_refused(llava, clip, ["differs from the source's", "brought back"], error=RuntimeError)


def test_sharded_by_class(llava, clip):
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    before = weights_sha256(llava)
    with pytest.raises(ValueError, match="swap first, wrap afterwards"):
        swap_vision_encoder(DeepSpeedEngine(llava), clip)
    assert weights_sha256(llava) == before


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_fully_sharded_tower(llava, clip):
    tower = llava.model.vision_tower
    before = [weight.detach().clone() for weight in tower.parameters()]
    fully_shard(tower, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="quantised or sharded .* is a DTensor"):
        swap_vision_encoder(llava, clip)
    assert all(torch.equal(old, new.full_tensor()) for old, new in zip(before, tower.parameters(), strict=True))


def test_source_with_an_adapter_or_two_towers(llava, vlm_of, clip):
    assert_refused(llava, vlm_of("video_llava"), ["2 CLIP towers", "model.image_tower"])
    wrapped = peft.get_peft_model(clip, peft.LoraConfig(target_modules=r".*vision_model.*\.v_proj"))
    assert_refused(llava, wrapped, ["merge_and_unload"])


@pytest.mark.parametrize("name", ["hidden_act", "num_attention_heads", "layer_norm_eps"])
@pytest.mark.parametrize("changed", ["tower", "source"])
def test_module_that_its_config_does_not_describe_is_refused(llava, clip, name, changed):
    """In bfloat16, where the outputs of the two activations are closer than the precision."""
    model = llava.bfloat16() if changed == "tower" else clip
    layer = (llava.model.vision_tower if changed == "tower" else clip.vision_model).encoder.layers[1]
    if name == "hidden_act":
        layer.mlp.activation_fn = torch.nn.GELU()
    elif name == "num_attention_heads":
        layer.self_attn.num_heads = 2
    else:
        layer.layer_norm1.eps = 1e-3
    before = weights_sha256(model)
    with pytest.raises(ValueError, match=f"the config says {name}=.* .*1.* computes with .*: make the two agree"):
        swap_vision_encoder(llava, clip)
    assert weights_sha256(model) == before
