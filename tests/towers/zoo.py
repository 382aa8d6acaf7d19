"""Tiny random vision-language models of many families, each with its stock image processor."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers.models.smolvlm import processing_smolvlm as smolvlm


IMAGE = 100  # the image token
_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_TEXT = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 200, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_SIZE = {"height": 32, "width": 32}
_CLIP = {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8, "projection_dim": 16, **_VIT}
_SIGLIP = {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, **_VIT}
_HEADLESS = {**_SIGLIP, "vision_use_head": False}
_GRID = [[64, 64], [32, 64], [64, 32]]
_CROP = {"size": {"shortest_edge": 32}, "crop_size": _SIZE}
_MARKS = {
    "image_token_id": IMAGE, "video_token_id": IMAGE + 1, "vision_start_token_id": IMAGE + 2,
    "vision_end_token_id": IMAGE + 3,
}  # fmt: skip
_ROTARY = {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}}
_PATCHES = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_QWEN = {
    "patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024},
}  # fmt: skip
_TILES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
_TILED = {"vision_config": {"image_size": 32, "patch_size": 8, **_VIT}, "image_token_id": IMAGE, "scale_factor": 2}


def _text(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_TEXT, **more}


# Family to class, settings of its config, class of its image processor and settings of it.
_FAMILIES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "llava": ("Llava", {"vision_config": _CLIP, "text_config": _text("llama"), "image_token_index": IMAGE}, "CLIP", _CROP),
    "vipllava": (
        "VipLlava",
        {"vision_config": _CLIP, "text_config": _text("llama"), "image_token_index": IMAGE, "vision_feature_layers": [-2, 1]},
        "CLIP",
        _CROP,
    ),
    "llava_next": (
        "LlavaNext",
        {"vision_config": _CLIP, "text_config": _text("llama"), "image_token_index": IMAGE, "image_grid_pinpoints": _GRID},
        "LlavaNext",
        {"image_grid_pinpoints": _GRID, **_CROP},
    ),
    "llava_onevision": (
        "LlavaOnevision",
        {
            "vision_config": _SIGLIP,
            "text_config": _text("qwen2"),
            "image_token_index": IMAGE,
            "image_grid_pinpoints": _GRID,
        },
        "LlavaOnevision",
        {"image_grid_pinpoints": _GRID, "size": _SIZE},
    ),
    "paligemma": (
        "PaliGemma",
        {
            "vision_config": {**_HEADLESS, "projection_dim": 48},
            "text_config": _text("gemma", head_dim=12),
            "projection_dim": 48,
            "image_token_index": IMAGE,
        },
        "Siglip",
        {"size": _SIZE},
    ),
    "gemma3": (
        "Gemma3",
        {
            "vision_config": _HEADLESS,
            "text_config": _text("gemma3_text", head_dim=12),
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
        },
        "Gemma3",
        {"size": _SIZE},
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {"vision_config": {**_PATCHES, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}, "text_config": _ROTARY, **_MARKS},
        "Qwen2VL",
        _QWEN,
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "vision_config": {
                **_PATCHES, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48, "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "text_config": _ROTARY,
            **_MARKS,
        },
        "Qwen2VL",
        _QWEN,
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "vision_config": {
                **_PATCHES, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 48,
                "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
            },
            "text_config": {**_ROTARY, "head_dim": 12},
            **_MARKS,
        },
        "Qwen2VL",
        _QWEN,
    ),
    "smolvlm": ("SmolVLM", {**_TILED, "text_config": _text("llama"), "pad_token_id": 0}, "SmolVLM", _TILES),
    "idefics3": ("Idefics3", {**_TILED, "text_config": _text("llama"), "pad_token_id": 0}, "Idefics3", _TILES),
    "internvl": (
        "InternVL",
        {
            "vision_config": {"image_size": [32, 32], "patch_size": [8, 8], **_VIT},
            "text_config": _text("qwen2"),
            "image_token_id": IMAGE,
            "downsample_ratio": 0.5,
        },
        "GotOcr2",
        {"size": _SIZE, "crop_to_patches": False},
    ),
    "mistral3": (
        "Mistral3",
        {
            "vision_config": {"model_type": "pixtral", "image_size": 64, "patch_size": 8, "head_dim": 8, **_VIT},
            "text_config": _text("mistral", head_dim=12),
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
        },
        "Pixtral",
        {"size": {"longest_edge": 48}, "patch_size": {"height": 16, "width": 16}},
    ),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)
NAMES = {family: settings[0] for family, settings in _FAMILIES.items()}


def tiny_vlm(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A random model of a family in evaluation mode, and its image processor."""
    name, settings, processor, sizes = _FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(tf, f"{name}Config")(**settings)
    vlm = getattr(tf, f"{name}ForConditionalGeneration")(config).eval()
    if family == "gemma3":  # starts at zero, where no gradient passes
        nn.init.normal_(vlm.model.multi_modal_projector.mm_input_projection_weight)
    return vlm, getattr(tf, f"{processor}ImageProcessor")(**sizes)


def saved(family: str, folder: Any) -> tuple[Any, Any]:
    """As `tiny_vlm`, and its stock folder."""
    vlm, processor = tiny_vlm(family)
    vlm.save_pretrained(folder)
    processor.save_pretrained(folder)
    return vlm, processor


# Family to class of its processor, special tokens (the image's first), and what the processor is told beside its parts.
_CUT = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_LLAVA = ("Llava", {"image_token": "<image>"}, _CUT)
_PADS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}  # fmt: skip
_FAKE = {
    "image_token": "<image>", "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}  # fmt: skip
_PROCESSORS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "llava": _LLAVA,
    "vipllava": _LLAVA,
    "llava_next": ("LlavaNext", _LLAVA[1], _CUT),
    "llava_onevision": (
        "LlavaOnevision",
        {"image_token": "<image>", "video_token": "<video>"},
        {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    ),
    "paligemma": ("PaliGemma", _LLAVA[1], {}),
    "gemma3": (
        "Gemma3",
        {"image_token": "<soft>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        {"image_seq_length": 4},
    ),
    "qwen2_vl": ("Qwen2VL", _PADS, {}),
    "qwen2_5_vl": ("Qwen2_5_VL", _PADS, {}),
    "qwen3_vl": ("Qwen3VL", _PADS, {}),
    "smolvlm": ("SmolVLM", _FAKE, {"image_seq_len": 4}),
    "idefics3": ("Idefics3", _FAKE, {"image_seq_len": 4}),
    "internvl": (
        "InternVL",
        {"context_image_token": "<c>", "start_image_token": "<s>", "end_image_token": "</s>", "video_token": "<v>"},
        {"image_seq_length": 4},
    ),
    "mistral3": (
        "Pixtral",
        {"image_token": "[IMG]", "image_break_token": "[BREAK]", "image_end_token": "[END]"},
        {"patch_size": 8, "spatial_merge_size": 2, "image_break_token": "[BREAK]", "image_end_token": "[END]"},
    ),
}
VIDEOS = {"qwen2_5_vl": "Qwen2VL"}
TEMPLATE = "[BOS] w9 {% for part in messages[0].content %}{{ part.text if part.text else 'IMAGE' }} {% endfor %}w8"


def tiny_tokenizer(marks: dict[str, str]) -> Any:
    """One token a word: w10 to w99 and w110 to w199, the special ones, and the newline."""
    words = {f"w{index}": index for index in range(200)}
    named = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, "\n": 4}
    named |= {mark: IMAGE + place for place, mark in enumerate(marks.values())}
    vocabulary = {word: index for word, index in words.items() if index not in named.values()} | named
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=dict(marks), **special)
    fast.add_tokens(["\n"])
    return fast


def tiny_processor(family: str, images: Any, *, template: bool = False) -> Any:
    """The stock processor of a family around its image processor, with a chat template if asked."""
    name, marks, more = _PROCESSORS[family]
    kind = getattr(tf, f"{name}Processor")
    smolvlm.num2words = smolvlm.num2words or str  # for videos only, and an error at once without it
    parts = {"image_processor": images, "tokenizer": tiny_tokenizer(marks)}
    if "video_processor" in inspect.signature(kind.__init__).parameters:
        parts["video_processor"] = getattr(tf, f"{VIDEOS.get(family, name)}VideoProcessor")()
    if family == "paligemma":
        images.image_seq_length = 16
    processor = kind(**parts, **more)
    if template:
        processor.chat_template = TEMPLATE.replace("IMAGE", processor.image_token)
    return processor
