"""Key maps between open_clip's (and OpenAI's) vision transformer and transformers' `CLIPVisionModel`, both ways.

"CLIP keys" are those of `CLIPVisionModel.state_dict()`, plus `visual_projection.weight` where there is a projection.
"""

from __future__ import annotations

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
    fused = {f"encoder.layers.{i}.self_attn.{n}_proj.{w}" for i, n, w in _fused(num_layers)}
    return set(_plain(num_layers).values()) | fused


def openclip_to_hf(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the vision weights of an open_clip or OpenAI state dict to CLIP keys.

    The fused query, key and value weights are split and the projection is transposed. Containers and prefixes that
    training scripts leave (`state_dict`, `vision_encoder_state_dict`, `module.`, `visual.`, `model.`) are taken off.
    What the weights do not tell (activation, number of heads, epsilon) is not touched here.

    Args:
        state_dict: A vision transformer's own state dict, or one that holds it.

    Returns:
        CLIP keys to tensors that share memory with the input where that is possible.

    Raises:
        ValueError: If there is no plain vision transformer in it, or a key is unknown or missing.
    """
    state = _below_anchor(_unwrap(state_dict), "class_embedding")
    num_layers = _count(state, "transformer.resblocks.")
    names = _plain(num_layers)
    fused = {
        f"transformer.resblocks.{i}.attn.in_proj_{w}": (i, w) for i in range(num_layers) for w in ("weight", "bias")
    }
    _check_keys(state, set(names) | set(fused), optional={"proj"}, wanted="an open_clip vision transformer")
    converted = {names[key]: value for key, value in state.items() if key in names}
    for key, (layer, kind) in fused.items():
        for name, part in zip("qkv", state[key].chunk(3), strict=True):
            converted[f"encoder.layers.{layer}.self_attn.{name}_proj.{kind}"] = part
    if "proj" in state:
        converted[PROJECTION] = state["proj"].T.contiguous()
    return converted


def hf_to_openclip(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename CLIP vision weights to the keys of an open_clip vision transformer: the inverse of `openclip_to_hf`.

    Args:
        state_dict: State dict of a `CLIPVisionModel`, `CLIPVisionModelWithProjection`, `CLIPModel`, or of a model
            that holds one of them.

    Returns:
        Keys of open_clip's `visual`; `proj` is among them only if the input has a visual projection.

    Raises:
        ValueError: If there is no CLIP vision tower in it, or a key is unknown or missing.
    """
    state = clip_state(state_dict)
    num_layers = _count(state, "encoder.layers.")
    converted = {old: state[new] for old, new in _plain(num_layers).items()}
    for layer in range(num_layers):
        for kind in ("weight", "bias"):
            parts = [state[f"encoder.layers.{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            converted[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    if PROJECTION in state:
        converted["proj"] = state[PROJECTION].T.contiguous()
    return converted


def clip_state(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vision weights of any CLIP state dict, Hugging Face's or open_clip's, under CLIP keys.

    Raises:
        ValueError: If there is no CLIP vision tower in it, or a key is unknown or missing.
    """
    whole = _unwrap(state_dict)
    if not any(key.endswith("embeddings.class_embedding") for key in whole):
        return openclip_to_hf(whole)
    state = _below_anchor(whole, "embeddings.class_embedding")
    state.pop("embeddings.position_ids", None)  # a buffer that old versions of transformers saved
    (anchor,) = (key for key in whole if key.endswith("embeddings.class_embedding"))
    outside = anchor.removesuffix("embeddings.class_embedding").removesuffix("vision_model.") + PROJECTION
    if outside in whole:
        state[PROJECTION] = whole[outside]
    _check_keys(state, clip_keys(_count(state, "encoder.layers.")), optional={PROJECTION}, wanted="a CLIPVisionModel")
    return state


def interpolate_positions(positions: Tensor, num_patches: int) -> Tensor:
    """Resize position embeddings to another number of patches, as transformers' `interpolate_pos_encoding` does.

    The row of the class token is kept. open_clip's own resize uses antialiasing and differs from this.

    Args:
        positions: Shape (1 + patches, width); the patches form a square.
        num_patches: Wanted number of patches, a square number.

    Returns:
        Shape (1 + num_patches, width).
    """
    old, new = square_side(len(positions) - 1), square_side(num_patches)
    grid = positions[1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([positions[:1], grid.permute(0, 2, 3, 1).reshape(new * new, -1)])


def square_side(num_patches: int) -> int:
    """Side of a square grid of patches.

    Raises:
        ValueError: If the number is not a square.
    """
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches do not form a square grid; only square images are supported.")
    return side


def _plain(num_layers: int) -> dict[str, str]:
    """The weights that only change their name, open_clip key to CLIP key."""
    names = dict(_OUTER)
    for i in range(num_layers):
        for old, new in _INNER.items():
            for kind in ("weight", "bias"):
                names[f"transformer.resblocks.{i}.{old}.{kind}"] = f"encoder.layers.{i}.{new}.{kind}"
    return names


def _fused(num_layers: int) -> list[tuple[int, str, str]]:
    return [(i, name, kind) for i in range(num_layers) for name in "qkv" for kind in ("weight", "bias")]


def _unwrap(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """Take off the dict that a training script put around the weights."""
    for key in _CONTAINERS:
        if isinstance(state_dict.get(key), Mapping):
            return _unwrap(state_dict[key])
    state = {key: value for key, value in state_dict.items() if isinstance(value, Tensor)}
    if not state:
        raise ValueError(f"there are no weights in this state dict, only {list(state_dict)[:5]}.")
    return state


def _below_anchor(state: Mapping[str, Tensor], anchor: str) -> dict[str, Tensor]:
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


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers: one more than the highest index after `prefix`."""
    numbers = {key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)}
    return max((int(number) for number in numbers if number.isdigit()), default=-1) + 1


def _check_keys(state: Mapping[str, Tensor], expected: set[str], *, optional: set[str], wanted: str) -> None:
    unknown = sorted(set(state) - expected - optional)
    missing = sorted(expected - set(state))
    if unknown or missing:
        raise ValueError(
            f"the state dict is not that of {wanted}: {len(unknown)} unknown keys {unknown[:3]}, "
            f"{len(missing)} missing keys {missing[:3]}. Merge adapters first (merge_and_unload()); attention pooling, "
            "layer scale and other additions have no place in CLIP."
        )
