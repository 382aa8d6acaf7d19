"""Where in a network training takes place: what the loss reads, less frozen first blocks, ever slower to the input."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from hf_robust_vision.towers.load import Encoder


_BLOCK = re.compile(r"(vision_model|text_model)\.encoder\.layers\.(\d+)\.")
_INPUT = re.compile(r"(vision_model|text_model)\.(embeddings|pre_layrnorm)\.")


def freeze_first_blocks(encoder: Encoder, count: int) -> None:
    """Freeze the vision tower's embeddings and its first blocks, in place; 0 freezes nothing."""
    if count == 0:
        return
    tower: Any = encoder.vision_model
    blocks = tower.encoder.layers
    if count > len(blocks):
        raise ValueError(f"freeze_blocks={count}, but the vision tower has {len(blocks)} blocks.")
    for part in (tower.embeddings, tower.pre_layrnorm, *blocks[:count]):
        part.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError(f"freeze_blocks={count} leaves nothing to train: the loss reads no later block.")


def learning_rate_scales(encoder: nn.Module, decay: float) -> dict[str, float]:
    """Name of every parameter to its share of the learning rate, `decay ** (blocks between it and the output)`.

    In a tower of L blocks, block i (from 0) has `decay ** (L - i)`, what lies before the blocks `decay ** (L + 1)`,
    and what comes after them, projections among it, 1.

    Reference:
        BEiT, https://huggingface.co/papers/2106.08254.
    """
    # Searched for and not matched from the start, as DDP puts `module.` before the names.
    names = [name for name, _ in encoder.named_parameters()]
    found = [(match[1], int(match[2])) for name in names if (match := _BLOCK.search(name))]
    depth = {tower: 1 + max(block for of, block in found if of == tower) for tower in {tower for tower, _ in found}}

    def scale(name: str) -> float:
        if match := _BLOCK.search(name):
            return decay ** (depth[match[1]] - int(match[2]))
        if match := _INPUT.search(name):
            return decay ** (depth[match[1]] + 1)
        return 1.0

    return {name: scale(name) for name in names}


def decay_learning_rates(optimizer: torch.optim.Optimizer, encoder: nn.Module, decay: float) -> None:
    """Split the groups of a fresh optimizer, so that each parameter gets its share of the learning rate.

    Everything else about a group, such as its weight decay, stays; so does a schedule, which multiplies each group's rate.
    """
    if decay == 1:
        return
    scales = learning_rate_scales(encoder, decay)
    scale_of = {id(parameter): scales[name] for name, parameter in encoder.named_parameters()}
    groups = []
    for group in optimizer.param_groups:
        for scale in sorted({scale_of[id(parameter)] for parameter in group["params"]}):
            members = [parameter for parameter in group["params"] if scale_of[id(parameter)] == scale]
            groups.append({**group, "params": members, "lr": group["lr"] * scale})
    optimizer.param_groups[:] = groups
