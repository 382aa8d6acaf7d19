"""Key maps between open_clip's (and OpenAI's) vision transformer and transformers' `CLIPVisionModel`, both ways.

"CLIP keys" are those of `CLIPVisionModel.state_dict()`, plus `visual_projection.weight` where there is a projection.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


PROJECTION = "visual_projection.weight"
POSITIONS = "embeddings.position_embedding.weight"

_CONTAINERS = ("state_dict", "vision_encoder_state_dict", "model_state_dict", "model", "module")
_OUTER = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": POSITIONS,
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def clip_keys(num_layers: int) -> set[str]:
    """The keys of a `CLIPVisionModel` of so many layers, without a projection."""
    return {name for names in key_map(num_layers).values() for name in names}


def openclip_to_hf(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the vision weights of an open_clip or OpenAI state dict to CLIP keys; they may share memory with the input.

    Containers and prefixes that training scripts leave (`state_dict`, `model`, `module.`, `visual.`, ...) are taken off.

    Raises:
        ValueError: If there is no plain vision transformer in it, or a key is unknown or missing.
    """
    # The class token marks the tower whatever prefix it has: a CLIP has one of it, a ResNet and a text tower have none.
    state = find_below(unwrap(state_dict), "class_embedding")
    places = key_map(count(state, "transformer.resblocks."))
    check_keys(state, set(places), optional={"proj"}, wanted="an open_clip vision transformer")
    converted: dict[str, Tensor] = {}
    for key, names in places.items():
        converted |= zip(names, state[key].chunk(len(names)), strict=True)
    # open_clip multiplies tokens with its projection from the right, a linear layer does so from the left.
    return converted | ({PROJECTION: state["proj"].T.contiguous()} if "proj" in state else {})


def hf_to_openclip(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `openclip_to_hf`; `proj` is among the keys only if the input has a visual projection.

    Raises:
        ValueError: If there is no CLIP vision tower in it, or a key is unknown or missing.
    """
    state = clip_state(state_dict)
    converted = {
        key: state[names[0]] if len(names) == 1 else torch.cat([state[name] for name in names])
        for key, names in key_map(count(state, "encoder.layers.")).items()
    }
    return converted | ({"proj": state[PROJECTION].T.contiguous()} if PROJECTION in state else {})


def clip_state(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vision weights of any CLIP state dict, Hugging Face's or open_clip's, under CLIP keys."""
    whole = unwrap(state_dict)
    if not any(key.endswith("embeddings.class_embedding") for key in whole):
        return openclip_to_hf(whole)
    state = find_below(whole, "embeddings.class_embedding")
    state.pop("embeddings.position_ids", None)  # a buffer that old versions of transformers saved
    (anchor,) = (key for key in whole if key.endswith("embeddings.class_embedding"))
    # The projection lies beside the tower in a CLIPModel, not in it.
    outside = anchor.removesuffix("embeddings.class_embedding").removesuffix("vision_model.") + PROJECTION
    if outside in whole:
        state[PROJECTION] = whole[outside]
    check_keys(state, clip_keys(count(state, "encoder.layers.")), optional={PROJECTION}, wanted="a CLIPVisionModel")
    return state


def interpolate_positions(positions: Tensor, num_patches: int, class_tokens: int = 1) -> Tensor:
    """Resize position embeddings, shape (class_tokens + patches, width), to another square number of patches.

    The row of the class token is kept.
    """
    # As `interpolate_pos_encoding` of transformers, whose the VLM is. open_clip's own resize uses antialiasing, and differs
    # by up to 0.018 on random embeddings.
    old, new = square_side(len(positions) - class_tokens), square_side(num_patches)
    grid = positions[class_tokens:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:class_tokens], grid.permute(0, 2, 3, 1).reshape(new * new, -1)])


def square_side(num_patches: int) -> int:
    """Side of a square grid of patches; any other is refused."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches do not form a square grid; only square images are supported.")
    return side


def key_map(num_layers: int) -> dict[str, tuple[str, ...]]:
    """open_clip's keys to CLIP's: one, or the three that open_clip keeps on top of each other in one matrix."""
    names: dict[str, tuple[str, ...]] = {old: (new,) for old, new in _OUTER.items()}
    for i, kind in itertools.product(range(num_layers), ("weight", "bias")):
        old, new = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
        names |= {f"{old}.{a}.{kind}": (f"{new}.{b}.{kind}",) for a, b in _INNER.items()}
        fused = (
            f"{old}.attn.in_proj_{kind}"  # nn.MultiheadAttention's, whose parts are query, key, value in this order
        )
        names[fused] = tuple(f"{new}.self_attn.{part}_proj.{kind}" for part in "qkv")
    return names


def unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take off the dict that a training script put around the weights."""
    for key in _CONTAINERS:
        if isinstance(state_dict.get(key), Mapping):
            return unwrap(state_dict[key])
    state = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"there are no weights in this state dict, only {list(state_dict)[:5]}.")
    return state


def find_below(state: Mapping[str, Tensor], anchor: str) -> dict[str, Tensor]:
    """The weights under the one prefix at which `anchor` stands, the prefix taken off."""
    prefixes = [key.removesuffix(anchor) for key in state if key == anchor or key.endswith(f".{anchor}")]
    if len(prefixes) != 1:
        found = f"{len(prefixes)} ({', '.join(map(repr, prefixes))})" if prefixes else "none"
        kind = ""
        if any("trunk." in key for key in state):
            kind = " Its 'trunk.' keys are those of a timm tower, which is not supported."
        elif any("layer1." in key for key in state):
            kind = " Its 'layer1.' keys are those of a ResNet, which is not supported."
        raise ValueError(
            f"wanted a state dict with one CLIP vision transformer ('...{anchor}'), found {found}; "
            f"first keys: {list(state)[:3]}.{kind}"
        )
    return {key.removeprefix(prefixes[0]): value for key, value in state.items() if key.startswith(prefixes[0])}


def count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers: one more than the highest index after `prefix`."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def check_keys(state: Mapping[str, Tensor], expected: set[str], *, optional: set[str], wanted: str) -> None:
    """Refuse a state dict with other keys than those that a class has, told by its name in `wanted`."""
    unknown = sorted(set(state) - expected - optional)
    missing = sorted(expected - set(state))
    if unknown or missing:
        raise ValueError(
            f"the state dict is not that of {wanted}: {len(unknown)} unknown keys {unknown[:3]}, "
            f"{len(missing)} missing keys {missing[:3]}. Merge adapters first (merge_and_unload()); attention pooling, "
            "layer scale and other additions have no place in it."
        )
