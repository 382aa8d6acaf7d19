"""Minimal stand-ins with the names and the mathematics of open_clip's tower, OpenFlamingo and the original LLaVA."""

from collections import OrderedDict

import torch
from torch import nn


class QuickGELU(nn.Module):
    def forward(self, hidden):
        return hidden * torch.sigmoid(1.702 * hidden)


class Block(nn.Module):
    def __init__(self, width, heads, mlp, act):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)  # the batch second, as in open_clip before 2.25
        layers = [("c_fc", nn.Linear(width, mlp)), ("gelu", act()), ("c_proj", nn.Linear(mlp, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, hidden):
        normed = self.ln_1(hidden)
        hidden = hidden + self.attn(normed, normed, normed, need_weights=False)[0]
        return hidden + self.mlp(self.ln_2(hidden))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads, mlp, act):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp, act) for _ in range(layers))

    def forward(self, hidden):
        for block in self.resblocks:
            hidden = block(hidden)
        return hidden


class VisionTransformer(nn.Module):
    """Gives the pooled, projected class token and the patch tokens of the last block."""

    def __init__(self, size=32, patch=8, width=32, layers=4, heads=4, mlp=48, dim=24, act=QuickGELU):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, mlp, act)
        self.proj = nn.Parameter(torch.randn(width, dim))

    def forward(self, pixel_values):
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        hidden = torch.cat([self.class_embedding.expand(len(patches), 1, -1), patches], dim=1)
        hidden = self.ln_pre(hidden + self.positional_embedding).transpose(0, 1)
        hidden = self.transformer(hidden).transpose(0, 1)
        return self.ln_post(hidden[:, 0]) @ self.proj, hidden[:, 1:]


class Flamingo(nn.Module):
    """Reads the patch tokens of its vision encoder, as OpenFlamingo does."""

    def __init__(self, vision_encoder, width=32):
        super().__init__()
        self.vision_encoder, self.perceiver = vision_encoder, nn.Linear(width, 8)

    def forward(self, pixel_values):
        return self.perceiver(self.vision_encoder(pixel_values)[1])


class LlavaTower(nn.Module):
    """The wrapper of the original LLaVA code around a CLIPVisionModel."""

    def __init__(self, vision_tower, select_layer=-2):
        super().__init__()
        self.is_loaded, self.select_layer = vision_tower is not None, select_layer
        if vision_tower is not None:
            self.vision_tower = vision_tower


class OriginalLlava(nn.Module):
    def __init__(self, wrapper, *, in_list=False):
        super().__init__()
        self.wrapper = [wrapper] if in_list else wrapper

    def get_vision_tower(self):
        return self.wrapper
