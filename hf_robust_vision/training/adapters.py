"""LoRA: an adapter on the layers that would train, its checkpoint, and the stock model it is merged into."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_robust_vision.towers.clip import Encoder, as_encoder, load_encoder, weights_sha256

from .config import AdversarialTrainingArguments


ADAPTER = "default"
ADAPTER_FOLDER = "adapter"
_WEIGHTS_FILE = "adapter_model.safetensors"
_TOWERS = {"vision_model": "visual_projection", "text_model": "text_projection"}


def add_adapter(encoder: Encoder, args: AdversarialTrainingArguments) -> None:
    """Put a LoRA adapter into an encoder, in place; afterwards nothing but the adapter trains.

    Its first weights depend on `args.seed` only, so that they are the same on every process.

    Args:
        encoder: Only linear layers whose weights train now get an adapter.
        args: Rank, scale, dropout, names of layers.

    Raises:
        ValueError: If no layer that trains has one of the names.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=target_pattern(encoder, args.lora_target_modules),
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(args.seed)
        encoder.add_adapter(config, ADAPTER)


def target_pattern(encoder: Encoder, names: Sequence[str] | None = None) -> str:
    """A pattern of the whole paths of the linear layers that train, for `LoraConfig.target_modules`.

    A mere list of names such as `q_proj` would hit the text tower as well.

    Args:
        encoder: Its `requires_grad` flags say what trains.
        names: Last parts of the paths that are wanted; by default all.

    Raises:
        ValueError: If there is no such layer.
    """
    linear = [
        path
        for path, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad
    ]
    last = {path: path.rpartition(".")[2] for path in linear}
    if strange := sorted(set(names or ()) - set(last.values())):
        raise ValueError(
            f"lora_target_modules={strange} are no linear layers that would train; there are {sorted(set(last.values()))}."
        )
    if not linear:
        raise ValueError("use_peft: no linear layer would train, so there is nothing to adapt.")
    chosen = [path for path in linear if names is None or last[path] in names]
    parts = []
    for tower, projection in _TOWERS.items():
        inside = [path for path in chosen if path.startswith(f"{tower}.encoder.layers.")]
        if inside:
            blocks = sorted({int(path.split(".")[3]) for path in inside})
            layers = sorted({last[path] for path in inside})
            parts.append(rf"{tower}\.encoder\.layers\.(?:{_any_of(blocks)})\..*\.(?:{_any_of(layers)})")
        if projection in chosen:
            parts.append(projection)
    return "|".join(parts)


def has_adapter(encoder: nn.Module) -> bool:
    """Whether `add_adapter` was called on an encoder."""
    return bool(getattr(encoder, "_hf_peft_config_loaded", False))


def load_adapter(encoder: Encoder, folder: str | Path) -> None:
    """Read the adapter's weights of a checkpoint into an encoder that has one of the same shape.

    Raises:
        ValueError: If it is that of other layers or of another rank.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    found = load_file(Path(folder) / _WEIGHTS_FILE)
    state = {name.removeprefix("base_model.model."): value for name, value in found.items()}
    wanted = get_peft_model_state_dict(encoder, adapter_name=ADAPTER)
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in wanted.items()}:
        raise ValueError(
            f"the adapter in {folder} is of another rank or of other layers; go on with the lora_r and the "
            "lora_target_modules of its run."
        )
    set_peft_model_state_dict(encoder, state, adapter_name=ADAPTER)


def holds_adapter(folder: str | Path) -> bool:
    """Whether a folder is that of an adapter alone."""
    return (Path(folder) / _WEIGHTS_FILE).is_file()


def merged(encoder: Encoder) -> Encoder:
    """A copy of an encoder with its adapter added into the weights: the stock network, to save and to share."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    result = copy.deepcopy(encoder)
    for path, module in list(result.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, name = path.rpartition(".")
            setattr(result.get_submodule(parent), name, module.get_base_layer())
    result._hf_peft_config_loaded = False
    result.__dict__.pop("peft_config", None)
    return result


def merge_adapter(source: str | Path, *, base: Any = None) -> Encoder:
    """Load an adapter and the model that it was trained on, and add the one into the other.

    Args:
        source: Folder or Hub id of an adapter.
        base: The model that it was trained on, or its folder or Hub id; by default the one that the adapter names.

    Returns:
        An encoder; its `save_pretrained` writes a stock model folder.

    Raises:
        ValueError: If the adapter does not name its base, or does not fit it.
    """
    from peft import PeftConfig, PeftModel

    named = base if base is not None else PeftConfig.from_pretrained(str(source)).base_model_name_or_path
    if not named:
        raise ValueError(f"the adapter {source} does not name the model that it was trained on: pass base=.")
    encoder = as_encoder(copy.deepcopy(named)) if isinstance(named, nn.Module) else load_encoder(named)
    before = weights_sha256(encoder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            result = PeftModel.from_pretrained(encoder, str(source)).merge_and_unload(safe_merge=True)
        except (UserWarning, RuntimeError) as error:
            raise ValueError(f"the adapter {source} does not fit {type(encoder).__name__}: {error}") from error
    if weights_sha256(result) == before:
        raise ValueError(f"the adapter {source} leaves its base as it was; it was trained on another class of model.")
    return result


def _any_of(parts: Sequence[object]) -> str:
    return "|".join(re.escape(str(part)) for part in parts)
