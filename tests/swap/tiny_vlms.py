"""Tiny random models: every LLaVA-family class, and CLIP models to swap in."""

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)


LAYERS, WIDTH, PATCH, SIZE = 4, 32, 8, 32
IMAGE_TOKEN, VIDEO_TOKEN, VOCAB = 60, 61, 64
TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 256,
}
PINPOINTS = [[SIZE, 2 * SIZE], [2 * SIZE, SIZE]]
FAMILY = {
    "llava": (LlavaForConditionalGeneration, LlavaConfig, {}),
    "llava_next": (LlavaNextForConditionalGeneration, LlavaNextConfig, {"image_grid_pinpoints": PINPOINTS}),
    "llava_next_video": (
        LlavaNextVideoForConditionalGeneration,
        LlavaNextVideoConfig,
        {"image_grid_pinpoints": PINPOINTS, "video_token_index": VIDEO_TOKEN},
    ),
    "vipllava": (VipLlavaForConditionalGeneration, VipLlavaConfig, {"vision_feature_layers": [-2, -3, 1]}),
    "video_llava": (VideoLlavaForConditionalGeneration, VideoLlavaConfig, {"video_token_index": VIDEO_TOKEN}),
}


def vision_settings(**changes):
    settings = {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        "projection_dim": 24,
    }
    return {**settings, **changes}


def randomise(model, seed):
    """Weights far from their initial values, so that no two parts are equal by accident."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def make_vlm(name, **vision):
    kind, config, extra = FAMILY[name]
    torch.manual_seed(0)
    model = kind(
        config(vision_config=vision_settings(**vision), text_config=TEXT, image_token_index=IMAGE_TOKEN, **extra)
    )
    model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return randomise(model, 1)


def make_clip(seed=7, **vision):
    torch.manual_seed(seed)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 32, "max_position_embeddings": 8, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=vision_settings(**vision), projection_dim=24)
    return randomise(CLIPModel(config), seed)


def vlm_inputs(name, *, size=SIZE, seed=3):
    """Inputs with one image, as the processor of that class would make them."""
    generator = torch.Generator().manual_seed(seed)
    grid = size // PATCH
    pixels = torch.randn(1, 3, size, size, generator=generator)
    extra, tokens = {"pixel_values_images" if name == "video_llava" else "pixel_values": pixels}, grid * grid
    if name.startswith("llava_next"):  # a base tile and two more, and one newline token a row
        extra = {"pixel_values": torch.randn(1, 3, 3, size, size, generator=generator)}
        extra["image_sizes"] = torch.tensor([[size, 2 * size]])
        tokens += 2 * grid * grid + grid
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN] * tokens, 9, 11]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **extra}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits
