"""Another image size: interpolated positions, or the VLM and its processor run at the source's size."""

import pytest
import torch
from PIL import Image
from tiny_vlms import IMAGE_TOKEN, PATCH, SIZE, VOCAB, logits, make_clip, vlm_inputs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

from hf_robust_vision.swap import interpolate_positions, swap_vision_encoder
from hf_robust_vision.towers.base import weights_sha256


BIG = 48


def make_processor(name):
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "what": 3, "<image>": IMAGE_TOKEN, "<video>": IMAGE_TOKEN + 1}
    words |= {f"w{i}": i for i in range(VOCAB) if i not in words.values()}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<image>", "<video>"]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", additional_special_tokens=special)
    sizes = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    options = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if name == "video_llava":
        parts = {"image_processor": VideoLlavaImageProcessor(**sizes)}
        parts["video_processor"] = VideoLlavaVideoProcessor(**sizes)
        return VideoLlavaProcessor(tokenizer=tokenizer, **parts, **options)
    return LlavaProcessor(CLIPImageProcessor(**sizes), tokenizer, **options)


def prepare(processor, image):
    return processor(text="what <image>", images=image, return_tensors="pt")


def pixels_of(inputs):
    return inputs.get("pixel_values_images", inputs.get("pixel_values"))  # the first is VideoLlava's name


@pytest.mark.parametrize(("size", "patches"), [(BIG, 36), (24, 9), (SIZE, 16)])
def test_interpolated_positions_are_those_of_transformers(size, patches):
    clip = make_clip(image_size=SIZE)
    pixel_values = torch.randn(2, 3, size, size)
    with torch.no_grad():
        wanted = clip.vision_model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        baked = make_clip(image_size=size)
        state = clip.vision_model.state_dict()
        key = "embeddings.position_embedding.weight"
        state[key] = interpolate_positions(state[key], patches)
        baked.vision_model.load_state_dict(state)
        assert torch.equal(baked.vision_model(pixel_values).last_hidden_state, wanted)


@pytest.mark.parametrize("name", ["llava", "llava_next", "video_llava"])
def test_interpolate(name, vlm_of, tmp_path):
    vlm, inputs, source = vlm_of(name), vlm_inputs(name), make_clip(image_size=BIG)
    report = swap_vision_encoder(vlm, source, resize="interpolate")
    assert report.image_size == SIZE
    assert any("interpolated from 36 to 16 patches" in warning for warning in report.warnings)
    vision = [part for key, part in vlm.model.named_children() if key.endswith("tower")]
    pixel_values = torch.randn(1, 3, SIZE, SIZE)
    with torch.no_grad():
        wanted = source.vision_model(pixel_values, interpolate_pos_encoding=True).last_hidden_state
        for tower in vision:
            assert torch.equal(tower(pixel_values).last_hidden_state, wanted)
    vlm.save_pretrained(tmp_path)
    assert torch.equal(logits(type(vlm).from_pretrained(tmp_path).eval(), inputs), logits(vlm, inputs))


@pytest.mark.parametrize("name", ["llava", "vipllava", "video_llava"])
def test_native(name, vlm_of, tmp_path):
    vlm, source, processor = vlm_of(name), make_clip(image_size=BIG), make_processor(name)
    before, before_logits = weights_sha256(vlm), logits(vlm, vlm_inputs(name))
    vlm.config.architectures, vlm.config.dtype = [type(vlm).__name__], "float32"  # as save_pretrained writes them
    config, text = vlm.config.to_dict(), processor.to_json_string()
    report = swap_vision_encoder(vlm, source, resize="native", processor=processor)

    assert report.image_size == BIG
    assert -1 < report.towers[0].drift < 0.999
    assert dict(processor.image_processor.size) == {"shortest_edge": BIG}  # a square would stretch the image
    noise = Image.effect_noise((70, 50), 80).convert("RGB")
    inputs = prepare(processor, noise)
    assert pixels_of(inputs).shape[-2:] == (BIG, BIG)
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == (BIG // PATCH) ** 2
    after = logits(vlm, inputs)
    assert vlm.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2

    vlm.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = type(vlm).from_pretrained(tmp_path).eval()
    assert again.config.vision_config.image_size == BIG
    assert getattr(again.config, "image_seq_length", 36) == 36
    inputs_again = prepare(AutoProcessor.from_pretrained(tmp_path), noise)
    assert torch.equal(pixels_of(inputs_again), pixels_of(inputs))
    assert torch.equal(logits(again, inputs_again), after)

    report.restore()
    assert weights_sha256(vlm) == before
    assert vlm.config.to_dict() == config
    assert processor.to_json_string() == text
    assert torch.equal(logits(vlm, vlm_inputs(name)), before_logits)


def test_restore_follows_the_model_to_its_dtype(llava):
    before = weights_sha256(llava.bfloat16())
    llava.float()
    report = swap_vision_encoder(llava, make_clip(image_size=BIG), resize="native", processor=make_processor("llava"))
    llava.bfloat16()
    report.restore()
    assert weights_sha256(llava) == before


def test_native_needs_a_processor_that_counts_patches_alike(llava):
    processor = make_processor("llava")
    processor.patch_size = 16
    with pytest.raises(ValueError, match="is 16, the tower's 8"):
        swap_vision_encoder(llava, make_clip(image_size=BIG), resize="native", processor=processor)


def test_native_at_the_same_size_needs_no_processor(llava, clip):
    assert swap_vision_encoder(llava, clip, resize="native").image_size == SIZE


def test_native_video(vlm_of):
    vlm, processor = vlm_of("video_llava"), make_processor("video_llava")
    swap_vision_encoder(vlm, make_clip(image_size=BIG), resize="native", processor=processor)
    frames = torch.randint(0, 256, (1, 2, 3, 50, 70), dtype=torch.uint8).numpy()
    inputs = processor(text="what <video>", videos=frames, return_tensors="pt")
    assert inputs["pixel_values_videos"].shape[-2:] == (BIG, BIG)
    assert torch.isfinite(logits(vlm, inputs)).all()
