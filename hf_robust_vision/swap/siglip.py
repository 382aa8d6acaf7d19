"""The keys of `SiglipVisionModel.state_dict()`, and how to find them in other state dicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_robust_vision.towers.siglip import refuse_free_size

from .open_clip import check_keys, clip_keys, clip_state, count, find_below, unwrap


_ANCHOR = "embeddings.patch_embedding.bias"  # CLIP's has none, text towers have no patches
_OF_CLIP = ("embeddings.class_embedding", "pre_layrnorm.weight", "pre_layrnorm.bias")

# The attention pooling, which VLMs leave out.
HEAD = frozenset(
    f"head.{name}"
    for name in (
        "probe", "attention.in_proj_weight", "attention.in_proj_bias", "attention.out_proj.weight",
        "attention.out_proj.bias", "layernorm.weight", "layernorm.bias", "mlp.fc1.weight", "mlp.fc1.bias",
        "mlp.fc2.weight", "mlp.fc2.bias",
    )
)  # fmt: skip


def siglip_keys(num_layers: int) -> set[str]:
    """The keys of a `SiglipVisionModel` of so many layers, without its head."""
    return clip_keys(num_layers) - set(_OF_CLIP) | {_ANCHOR}


def vision_state(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vision weights of a CLIP or SigLIP state dict, whatever stands before their keys.

    Raises:
        ValueError: If there is no whole tower of either in it, or it is of free image size.
    """
    whole = unwrap(state_dict)
    if not any(key.endswith(_ANCHOR) for key in whole):
        return clip_state(whole)
    state = find_below(whole, _ANCHOR)
    state.pop("embeddings.position_ids", None)
    if state["embeddings.patch_embedding.weight"].ndim == 2:  # a linear layer over patches that somebody else cut out
        refuse_free_size("siglip2", "the source")
    check_keys(state, siglip_keys(count(state, "encoder.layers.")), optional=set(HEAD), wanted="a SiglipVisionModel")
    if 0 < len(HEAD & set(state)) < len(HEAD):
        raise ValueError(f"the head of this SigLIP is not whole: it lacks {sorted(HEAD - set(state))[:3]}.")
    return state
