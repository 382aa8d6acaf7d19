"""Where in a network training takes place: what the loss reads, of some blocks only, ever slower to the input."""

from __future__ import annotations

from itertools import takewhile

import torch
from torch import nn

from hf_robust_vision.towers.load import Encoder


def layers_of(tower: nn.Module) -> tuple[list[nn.Parameter], nn.ModuleList]:
    """Weights of a tower's input, registered before its blocks, and the blocks: its longest list of modules.

    Raises:
        ValueError: If it has no list of modules.
    """
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"no blocks can be told apart in a {type(tower).__name__}: leave --trainable_layers, --freeze_blocks and --layer_decay out."
        )
    blocks = max(lists, key=len)
    inside = set(map(id, blocks.parameters()))
    return list(takewhile(lambda parameter: id(parameter) not in inside, tower.parameters())), blocks


def freeze_first_blocks(encoder: Encoder, count: int) -> None:
    """Freeze the vision tower's input and its first blocks, in place; 0 freezes nothing."""
    if count == 0:
        return
    before, blocks = layers_of(encoder.tower)
    if count > len(blocks):
        raise ValueError(f"freeze_blocks={count}, but the vision tower has {len(blocks)} blocks.")
    for parameter in [*before, *blocks[:count].parameters()]:
        parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError(f"freeze_blocks={count} leaves nothing to train: the loss reads no later block.")


def which_layers(text: str) -> tuple[str, int] | None:
    """Read "all" (None), "first:N" or "last:N"; a bare "first" or "last" is that of 1. Else a ValueError."""
    end, _, count = str(text).partition(":")  # YAML may hold a number
    if text == "all":
        return None
    if end not in ("first", "last") or not (count or "1").isdecimal() or int(count or 1) == 0 or text.endswith(":"):
        raise ValueError(f"trainable_layers={text!r} is none of all, first:N and last:N, with N blocks, 1 or more.")
    return end, int(count or 1)


def train_layers(encoder: Encoder, text: str) -> None:
    """Freeze, in place, what of the vision side is not among the layers asked for, as `which_layers` reads them.

    "first:N" are the vision tower's input and its first N blocks, what `freeze_first_blocks` would freeze; "last:N" its
    last N blocks and what comes after them, projections among it. What trains of a text tower is for the method to say.

    Raises:
        ValueError: If there are not so many blocks, or the loss reads none of them.
    """
    if (asked := which_layers(text)) is None:
        return
    end, count = asked
    before, blocks = layers_of(encoder.tower)
    if count > len(blocks):
        raise ValueError(f"trainable_layers={text}, but the vision tower has {len(blocks)} blocks.")
    first = len(blocks) - count if end == "last" else count
    early = {id(parameter) for parameter in [*before, *blocks[:first].parameters()]}
    vision = [parameter for part in encoder.trained_parts() for parameter in part.parameters()]
    for parameter in vision:
        if (id(parameter) in early) == (end == "last"):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in vision):
        raise ValueError(f"trainable_layers={text} leaves nothing to train: the loss reads none of these layers.")


def learning_rate_scales(encoder: Encoder, decay: float) -> dict[str, float]:
    """Name of every parameter to its share of the learning rate, `decay ** (blocks between it and the output)`.

    In a tower of L blocks, block i (from 0) has `decay ** (L - i)`, what lies before the blocks `decay ** (L + 1)`,
    and what comes after them, projections among it, 1.

    Reference:
        BEiT, https://huggingface.co/papers/2106.08254.
    """
    steps: dict[int, int] = {}
    for tower in (encoder.tower, getattr(encoder, "text_model", None)):
        if tower is None:
            continue
        before, blocks = layers_of(tower)
        for place, parameters in enumerate([before, *(block.parameters() for block in blocks)]):
            steps |= dict.fromkeys(map(id, parameters), len(blocks) + 1 - place)
    return {name: decay ** steps.get(id(parameter), 0) for name, parameter in encoder.named_parameters()}


def decay_learning_rates(optimizer: torch.optim.Optimizer, encoder: Encoder, decay: float) -> None:
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
