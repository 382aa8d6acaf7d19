"""Where the CLIP and SigLIP vision towers of a model live, and whether their weights may be touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_robust_vision.towers.adapters import has_adapter
from hf_robust_vision.towers.weights import FLOATS

from .layouts import OpenClipTower, SiglipTower, Tower


_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")
_HF_PARTS = (
    "pre_layrnorm", "embeddings.class_embedding", "embeddings.patch_embedding", "encoder.layers", "post_layernorm",
)  # fmt: skip
_SIGLIP_PARTS = ("embeddings.patch_embedding", "embeddings.position_embedding", "encoder.layers", "post_layernorm")
_OPEN_CLIP_PARTS = ("class_embedding", "positional_embedding", "conv1", "ln_pre", "transformer.resblocks", "ln_post")
_TOWER_NAMES = ("vision_tower", "vision_model", "vision_encoder", "image_tower", "visual", "image_encoder")


def find_towers(model: nn.Module, towers: str | Sequence[str] = "all") -> list[Tower]:
    """Find the CLIP and SigLIP vision towers of a model, or those at the paths `towers`.

    CLIP's may have the layout of transformers or of open_clip.

    It looks through `torch.compile`, DDP and PEFT wrappers, and into the wrapper of the original LLaVA code.

    Raises:
        TypeError: If it is no model, but the name of one.
        ValueError: If there is none, a path is not among those found, or the model is sharded.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"wanted a model, got {model!r:.80}: load it first, for instance with "
            "AutoModelForImageTextToText.from_pretrained(...)."
        )
    for path, module in model.named_modules():
        if type(module).__name__ in _SHARDED:
            raise ValueError(
                f"the model is wrapped in {type(module).__name__} (at {path or 'the top'}), which holds its weights "
                "in shards: swap first, wrap afterwards."
            )
    found = _original_llava(model, _walk(model, "", model_config(model)))
    if not found:
        raise ValueError(_nothing_found(model))
    if isinstance(towers, str) and towers == "all":
        return found
    wanted = [towers] if isinstance(towers, str) else list(towers)
    known = {tower.path: tower for tower in found}
    strange = [path for path in wanted if path not in known]
    if strange or not wanted:
        raise ValueError(
            f"no CLIP or SigLIP tower at {strange}; this model has {list(known)}: choose among them, or 'all'."
        )
    return [known[path] for path in wanted]


def model_config(model: nn.Module) -> Any:
    """The config of the model inside `torch.compile`, DDP and PEFT wrappers, or None."""
    inner: Any = model
    while inner is not None and not hasattr(inner, "config"):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    return getattr(inner, "config", None)


def check_writable(tower: Tower) -> None:
    """Refuse a tower whose weights are not plain tensors in memory under the names of its family."""
    weights = tower.weights()
    names = set(weights)
    if has_adapter(tower.module):
        raise ValueError(
            f"{tower} holds an adapter, which was trained on the old weights: merge or remove it first with "
            "merge_and_unload() or unload()."
        )
    for name, weight in weights.items():
        if weight.is_meta:
            raise ValueError(
                f"{tower} is offloaded ({name} is on the meta device), where copied weights vanish: load the model "
                "without offloading, swap, then dispatch it; or call "
                "accelerate.hooks.remove_hook_from_module(tower, recurse=True) first."
            )
        if hasattr(weight, "ds_id") or type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
            raise ValueError(
                f"{tower} is quantised or sharded ({name} is a {type(weight).__name__} of {weight.dtype}): load the "
                "model in float, swap, save_pretrained, and load it quantised again."
            )
    expected = tower.expected()
    if names != expected:
        raise ValueError(
            f"{tower} is not a plain {tower.family} tower of its config's {tower.geometry.num_hidden_layers} layers: "
            f"{len(names - expected)} unknown weights {sorted(names - expected)[:3]}, "
            f"{len(expected - names)} missing weights {sorted(expected - names)[:3]}. Quantised layers, adapters and "
            "cut towers look like this: undo that first."
        )


def _walk(model: nn.Module, prefix: str, config: Any) -> list[Tower]:
    found: list[Tower] = []
    modules = dict(model.named_modules())
    for path, module in modules.items():
        parent: Any = modules.get(path.rpartition(".")[0]) if path else None
        where = prefix + path
        read = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", None))
        # By what it is made of, not by its class: VLMs have classes of their own for the same layout.
        if _has(module, _HF_PARTS):
            own = getattr(getattr(parent, "config", None), "model_type", None) in ("clip", "clip_vision_model")
            projection = getattr(parent, "visual_projection", None) if own else None
            found.append(Tower(where, module, projection=projection, layers_read=_entries(read, module)))
        # But here the config has to tell: Idefics' and others of the same parts place their positions otherwise.
        elif getattr(getattr(module, "config", None), "model_type", "") == "siglip_vision_model":
            if _has(module, _SIGLIP_PARTS):
                found.append(SiglipTower(where, module, layers_read=_entries(read, module)))
        elif _has(module, _OPEN_CLIP_PARTS):
            tower = OpenClipTower(where, module)
            if path.rpartition(".")[2] == "vision_encoder":  # OpenFlamingo reads the patch tokens of the last block
                tower.layers_read = (len(tower.blocks),)
            found.append(tower)
    return found


def _original_llava(model: nn.Module, found: list[Tower]) -> list[Tower]:
    """Add the tower of the original LLaVA code, which may sit in a list, where torch does not look for modules."""
    holder: Any = next((m for m in model.modules() if callable(getattr(m, "get_vision_tower", None))), None)
    wrapper = holder.get_vision_tower() if holder is not None else None
    if isinstance(wrapper, list):
        wrapper = wrapper[0] if wrapper else None
    if wrapper is None or not hasattr(wrapper, "is_loaded"):
        return found
    if not wrapper.is_loaded:
        raise ValueError(
            "the vision tower of this LLaVA is not loaded yet: call model.get_vision_tower().load_model() first."
        )
    inner = [tower for tower in found if tower.module is wrapper.vision_tower]
    if not inner:
        inner = _walk(wrapper.vision_tower, "get_vision_tower().vision_tower", None)
        found = found + inner
    for tower in inner:
        tower.layers_read = _entries(getattr(wrapper, "select_layer", None), tower.module)
    return found


def _entries(read: Any, module: nn.Module) -> tuple[int, ...] | None:
    """Entries of `hidden_states` as counted from the start."""
    if read is None:
        return None
    entries = len(list(module.get_submodule("encoder.layers").children())) + 1
    return tuple(layer % entries for layer in ([read] if isinstance(read, int) else read))


def _has(module: nn.Module, parts: Sequence[str]) -> bool:
    """Whether the module itself holds the parts; wrappers that pass attributes on do not count."""
    for part in parts:
        here: Any = module
        for name in part.split("."):
            here = here._modules.get(name, here._parameters.get(name))
            if here is None:
                return False
    return True


def _nothing_found(model: nn.Module) -> str:
    towers = [
        f"{path}: {type(module).__name__}"
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in _TOWER_NAMES
        or type(module).__name__.endswith(("VisionModel", "VisionTransformer"))
    ]
    return (
        f"no CLIP or SigLIP vision tower in {type(model).__name__}; found {', '.join(towers[:4]) or 'no vision tower'}. "
        "Weights fit only a tower of their own layout; DINOv2, EVA, OwlViT, Pixtral and the like are other networks: "
        "harden such a VLM in place (hf-robust-vision harden-vlm)."
    )
