"""transformers' CLIP classes as encoders: images and text to features.

A `CLIPEncoder` is a `CLIPModel` whose `forward` takes images in [0, 1] and returns what every training loss needs.
Its state dict and its saved folder are those of a stock `CLIPModel`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPVisionModelWithProjection

from hf_robust_vision.pixels import PixelTransform

from .dual import DualEncoder, PooledEncoder


class _CLIPVision(PooledEncoder):
    """CLIP's vision tower: a class token is pooled and projected."""

    class_tokens = 1
    visual_projection: nn.Linear

    @classmethod
    def default_transform(cls, size: int) -> PixelTransform:
        return PixelTransform(resize=size, crop=(size, size))

    def project(self, pooled: Tensor) -> Tensor:
        return self.visual_projection(pooled)

    def trained_parts(self) -> list[nn.Module]:
        return [self.vision_model, self.visual_projection]


class CLIPEncoder(_CLIPVision, DualEncoder, CLIPModel):
    """A `CLIPModel` whose forward pass takes images in [0, 1] and, if asked, tokenized prompts."""

    stock_class = CLIPModel
    text_inputs = ("input_ids", "attention_mask")
    text_head = "text_projection"
    text_projection: nn.Linear

    def encode_prompts(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """As `DualEncoder.encode_prompts`."""
        return self.text_projection(self.text_model(**prompts).pooler_output)

    def vision_half(self) -> CLIPVisionModelWithProjection:
        """The vision tower and its projection as a stock model that shares their weights."""
        config = copy.deepcopy(self.config.vision_config)
        config.projection_dim = self.visual_projection.out_features  # a CLIPModel keeps its own beside the tower's
        with torch.device("meta"):
            tower = CLIPVisionModelWithProjection(config)
        tower.vision_model, tower.visual_projection = self.vision_model, self.visual_projection
        return tower.eval()


class CLIPVisionEncoder(_CLIPVision, CLIPVisionModelWithProjection):
    """A `CLIPVisionModelWithProjection` whose forward pass takes images in [0, 1]."""

    stock_class = CLIPVisionModelWithProjection
