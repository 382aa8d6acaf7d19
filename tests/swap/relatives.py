"""Tiny random models of every class outside the LLaVA family that the docs call supported, with inputs for each."""

import torch
import transformers as tf
from tiny_vlms import IMAGE_TOKEN, SIZE, randomise, vision_settings


PATCHES = 16
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
WORDS = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHORT = {**TEXT, **WORDS, "max_position_embeddings": 12}
DECODER = {**TEXT, **WORDS, "num_key_value_heads": 2, "max_position_embeddings": 256}
VISION = vision_settings()
BARE = {key: value for key, value in VISION.items() if key != "model_type"}


def pair(kind, config, **extra):
    """A model of an image tower and a text tower."""
    return lambda: kind(config(vision_config=BARE, text_config=SHORT, projection_dim=24, **extra))


def vlm(kind, config, text, **extra):
    """A VLM whose `vision_config` is a CLIP one."""
    text = {**DECODER, "model_type": text, **({"head_dim": 8} if text == "gemma" else {})}
    return lambda: kind(config(vision_config=VISION, text_config=text, image_token_index=IMAGE_TOKEN, **extra))


def dual():
    vision, text = tf.CLIPVisionConfig(**BARE), tf.BertConfig(**SHORT)
    return tf.VisionTextDualEncoderModel(tf.VisionTextDualEncoderConfig.from_vision_text_configs(vision, text))


def kosmos2():
    text = {"embed_dim": 16, "ffn_dim": 16, "layers": 1, "attention_heads": 2, **WORDS}
    config = tf.Kosmos2Config(vision_config=BARE, text_config=text, latent_query_num=4)
    return tf.Kosmos2ForConditionalGeneration(config)


def pixels():
    return torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def images_only():
    return {"pixel_values": pixels()}


def images_and_text(length=6, image_tokens=0):
    ids = torch.tensor([[1, 5, *[IMAGE_TOKEN] * image_tokens, *range(6, 4 + length)]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels()}


def clip_text():
    inputs = images_and_text()
    inputs["input_ids"][0, -1] = 2  # the end that the text towers pool at
    return inputs


def with_grid():
    tiles = pixels().expand(1, 2, 3, SIZE, SIZE).contiguous()  # the whole image and one tile of the same size
    tokens = 2 * PATCHES + 4  # and a newline after each row of the tile
    return {**images_and_text(image_tokens=tokens), "pixel_values": tiles, "image_sizes": torch.tensor([[SIZE, SIZE]])}


def kosmos2_inputs():
    inputs = images_and_text(10)
    mask = torch.zeros_like(inputs["input_ids"])
    mask[0, 1:5] = 1
    return {**inputs, "image_embeds_position_mask": mask}


def idefics():
    vision = {**{k: v for k, v in BARE.items() if k != "hidden_size"}, "embed_dim": 32, "hidden_act": "quick_gelu"}
    text = {**TEXT, **WORDS, "cross_layer_interval": 1, "qk_layer_norms": False, "use_resampler": False}
    return tf.IdeficsForVisionText2Text(tf.IdeficsConfig(**text, vision_config=vision))


def idefics_inputs():
    inputs = images_and_text()
    mask = torch.ones(1, inputs["input_ids"].shape[1], 1, dtype=torch.long)
    return {**inputs, "pixel_values": inputs["pixel_values"][:, None], "image_attention_mask": mask}


SEGMENT = {"extract_layers": [1, 2, 3], "reduce_dim": 8}
SEGMENT |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 8}
GRID = {"image_grid_pinpoints": [[SIZE, SIZE]], "vision_feature_select_strategy": "default"}

# Class, how it is made, where its tower is, what goes in. VLMs come first.
RELATIVES = {
    "llava_onevision": (
        vlm(tf.LlavaOnevisionForConditionalGeneration, tf.LlavaOnevisionConfig, "qwen2", **GRID),
        "model.vision_tower",
        with_grid,
    ),
    "paligemma": (
        vlm(tf.PaliGemmaForConditionalGeneration, tf.PaliGemmaConfig, "gemma", projection_dim=16, hidden_size=16),
        "model.vision_tower",
        lambda: images_and_text(image_tokens=PATCHES + 1),  # it reads the class token, too
    ),
    "aya_vision": (
        vlm(
            tf.AyaVisionForConditionalGeneration,
            tf.AyaVisionConfig,
            "cohere2",
            vision_feature_select_strategy="default",
        ),
        "model.vision_tower",
        lambda: images_and_text(image_tokens=PATCHES // 4),
    ),
    "git": (
        lambda: tf.GitForCausalLM(tf.GitConfig(vision_config=BARE, **SHORT | {"max_position_embeddings": 64})),
        "git.image_encoder.vision_model",
        images_and_text,
    ),
    "kosmos2": (kosmos2, "vision_model.model", kosmos2_inputs),
    "idefics": (idefics, "model.vision_model", idefics_inputs),
    "clip": (pair(tf.CLIPModel, tf.CLIPConfig), "vision_model", clip_text),
    "clip_vision": (lambda: tf.CLIPVisionModel(tf.CLIPVisionConfig(**BARE)), "", images_only),
    "clip_vision_with_projection": (
        lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**BARE)),
        "vision_model",
        images_only,
    ),
    "clip_classifier": (pair(tf.CLIPForImageClassification, tf.CLIPConfig), "vision_model", images_only),
    "altclip": (pair(tf.AltCLIPModel, tf.AltCLIPConfig), "vision_model", clip_text),
    "chinese_clip": (pair(tf.ChineseCLIPModel, tf.ChineseCLIPConfig), "vision_model", clip_text),
    "clipseg": (pair(tf.CLIPSegForImageSegmentation, tf.CLIPSegConfig, **SEGMENT), "clip.vision_model", clip_text),
    "metaclip_2": (pair(tf.MetaClip2Model, tf.MetaClip2Config), "vision_model", clip_text),
    "vision_text_dual_encoder": (dual, "vision_model", clip_text),
}
GENERATE = tuple(RELATIVES)[:6]


def make_relative(name):
    torch.manual_seed(0)
    model = randomise(RELATIVES[name][0](), 4)
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:  # a loaded model has zeros there
            torch.nn.init.zeros_(module.weight.data[module.padding_idx])
    if name in GENERATE:
        model.generation_config.update(eos_token_id=None, pad_token_id=0)
    return model


@torch.no_grad()
def answer(model, inputs):
    """What comes out of the whole model, whatever its name."""
    output = model(**inputs)
    names = ("logits", "logits_per_image", "image_embeds", "pooler_output")
    return next(output[name] for name in names if output.get(name) is not None)
