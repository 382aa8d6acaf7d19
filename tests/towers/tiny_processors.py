"""Stock processors for the tiny VLMs of `tests/vlm`, and questions about random pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)
from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor

from tests.swap.tiny_vlms import IMAGE_TOKEN, PATCH, PINPOINTS, SIZE, VIDEO_TOKEN, VOCAB, make_vlm


PROMPT = "<image> w1 {}"


def make_tokenizer():
    """One token a word, with the ids that the tiny models expect."""
    words = {f"w{index}": index for index in range(VOCAB)}
    named = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, "<image>": IMAGE_TOKEN, "<video>": VIDEO_TOKEN}
    vocabulary = {word: index for word, index in words.items() if index not in named.values()} | named
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<image>", "<video>"], **special
    )
    fast.padding_side = "left"
    return fast


def make_processor(name, **changes):
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}, **changes}
    shared = {"tokenizer": make_tokenizer(), "patch_size": PATCH, "vision_feature_select_strategy": "default"}
    shared["num_additional_image_tokens"] = 1
    if name == "video_llava":
        return VideoLlavaProcessor(
            image_processor=VideoLlavaImageProcessor(**size),
            video_processor=VideoLlavaVideoProcessor(**size),
            **shared,
        )
    if name == "llava_next":
        tiles = {"image_grid_pinpoints": PINPOINTS, **size}
        return LlavaNextProcessor(image_processor=LlavaNextImageProcessor(**tiles), **shared)
    if name == "llava_next_video":
        tiles = {"image_grid_pinpoints": PINPOINTS, **size}
        video = LlavaNextVideoVideoProcessor(**size)
        return LlavaNextVideoProcessor(
            image_processor=LlavaNextImageProcessor(**tiles), video_processor=video, **shared
        )
    return LlavaProcessor(image_processor=CLIPImageProcessor(**size), **shared)


def make_speaker(name):
    """A tiny VLM that says words only: with random weights a special token may be the likeliest."""
    vlm = make_vlm(name)
    with torch.no_grad():
        vlm.lm_head.weight[[0, 1, 2, 3, IMAGE_TOKEN, VIDEO_TOKEN]] = 0
    return vlm


def picture(seed, height, width):
    """Coarse noise, which no resize blurs away."""
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0]
    return Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


def as_images(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


@dataclass(frozen=True)
class Asked:
    """A question about a random picture, or a picture with captions."""

    id: int
    text: str = "w5"
    answer: str = "w7"
    references: tuple[str, ...] = ("w7 w8",)
    size: tuple[int, int] = (SIZE, SIZE)

    @property
    def image(self):
        return picture(self.id, *self.size)

    def pixels(self, transform):
        return transform.fit(as_images(self.image))[0]
