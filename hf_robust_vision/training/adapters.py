"""LoRA: an adapter on the layers that would train, and its way back into the model that it was trained on."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_robust_vision.towers.adapters import ADAPTER, merge_into, original_of
from hf_robust_vision.towers.clip import Encoder, as_encoder, load_encoder

from .config import AdversarialTrainingArguments


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
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=target_pattern(encoder, args.lora_target_modules),
        base_model_name_or_path=encoder.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(args.seed)
        inject_adapter_in_model(config, encoder, ADAPTER)


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
    if isinstance(base, nn.Module):
        return merge_into(as_encoder(copy.deepcopy(base)), source)
    name, revision = (base, None) if base is not None else original_of(source)
    return merge_into(load_encoder(name, revision=revision), source)


def _any_of(parts: Sequence[object]) -> str:
    return "|".join(re.escape(str(part)) for part in parts)
