"""Defences that only hide the gradient, as the literature knows them."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from hf_robust_vision.towers.clip import CLIPEncoder
from hf_robust_vision.towers.text_bank import TextBank


class InputQuantiser(CLIPEncoder):
    """Rounds the image to 16 levels a channel: the slope of a step is zero (Guo et al. 2018, Buckman et al. 2018)."""

    def encode_images(self, images, token_layer=None):
        return super().encode_images((images * 15).round() / 15, token_layer)


class RandomResize(CLIPEncoder):
    """Shrinks the image to a random size and puts it at a random place on black (Xie et al. 2018)."""

    def encode_images(self, images, token_layer=None):
        full = images.shape[-1]
        side = int(torch.randint(full * 3 // 4, full + 1, ()))
        left, top = (int(torch.randint(full - side + 1, ())) for _ in range(2))
        small = F.interpolate(images, (side, side), mode="bilinear", align_corners=False)
        return super().encode_images(F.pad(small, (left, full - side - left, top, full - side - top)), token_layer)


def masked(encoder: CLIPEncoder, kind: type[CLIPEncoder]) -> CLIPEncoder:
    """The same weights behind a masker."""
    twin = copy.copy(encoder)
    twin.__class__ = kind
    return twin


def saturated(bank: TextBank) -> TextBank:
    """A logit scale at which the softmax is exactly 0 and 1 in float32, and so without slope (Carlini and Wagner 2016)."""
    return replace(bank, logit_scale=1e5)


def rounded_tower(vlm: nn.Module) -> nn.Module:
    """A copy of a LLaVA whose vision tower is shown about 16 levels a channel."""
    twin = copy.deepcopy(vlm)
    first = next(layer for layer in twin.model.vision_tower.modules() if isinstance(layer, nn.Conv2d))
    first.register_forward_pre_hook(lambda layer, args: (args[0] * 4).round() / 4)
    return twin
