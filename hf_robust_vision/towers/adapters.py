"""LoRA inside a model: how it gets in, its folder, and the model that it is merged into, whole or not at all.

All of it goes through peft's own functions. Those that transformers offers on its models refuse the peft that a fresh
install brings.
"""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .weights import check_weights, find_file, load_state_dict, local_or_hub, weights_files


ADAPTER = "default"
ADAPTER_FOLDER = "adapter"
CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_WEIGHTS_FILES = (WEIGHTS_FILE, "adapter_model.bin")
_PREFIX = "base_model.model."  # what the paths in a folder have before those in the model


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer of a model is one of peft's."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")  # nothing is peft's where it was never imported
    return peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules())


def holds_adapter(name: str | Path) -> bool:
    """Whether a folder or Hub id is that of an adapter; one with a model beside it is refused."""
    if find_file(str(name), CONFIG_FILE) is None:
        return False
    if files := weights_files(str(name)):
        raise ValueError(
            f"{name} holds a model ({files[0].name}) and an adapter ({CONFIG_FILE}), and does not tell whether the one "
            f"is in the other: move the adapter to {name}/{ADAPTER_FOLDER}, and name the one that is meant."
        )
    return True


def refuse_adapter(name: str) -> None:
    """Refuse a folder or Hub id that holds an adapter where a model is wanted."""
    if holds_adapter(name):
        raise ValueError(
            f"{name} is a PEFT adapter of {_config_of(name).base_model_name_or_path!r}, not a model. Merge it first: "
            f"hf_robust_vision.merge_adapter({name!r}).save_pretrained(...)."
        )


def original_of(name: str | Path) -> tuple[str, str | None]:
    """Folder or Hub id, and revision, of the model that an adapter was trained on.

    Raises:
        ValueError: If the adapter does not tell, or tells a folder that is not there.
    """
    config = _config_of(name)
    if not config.base_model_name_or_path:
        raise ValueError(f"the adapter {name} does not name the model that it was trained on: pass base=.")
    try:
        return local_or_hub(config.base_model_name_or_path), config.revision
    except ValueError as error:
        raise ValueError(
            f"the model that the adapter {name} was trained on is not here: pass base=. ({error})"
        ) from error


def add_adapter(
    encoder: Any, rank: int, alpha: float, dropout: float = 0.0, *, target_modules: Sequence[str] | None, seed: int
) -> None:
    """Put a LoRA adapter into an encoder, in place; afterwards nothing but the adapter trains.

    Its first weights depend on the seed only, so that they are the same on every process.

    Args:
        encoder: Only linear layers whose weights train now get an adapter.
        rank: Of the two small matrices beside each weight.
        alpha: Their product counts `alpha / rank` times.
        dropout: On what enters them.
        target_modules: Last parts of the names of the layers that are wanted; by default all. One that none has is refused.
        seed: Of the first weights.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=_target_pattern(encoder, target_modules),
        base_model_name_or_path=encoder.name_or_path,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        inject_adapter_in_model(config, encoder, ADAPTER)


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the adapter of a model alone, as `peft.PeftModel.save_pretrained` does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = {_PREFIX + name: value.contiguous() for name, value in _adapter_state(model).items()}
    save_file(state, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Read the adapter's weights of a checkpoint into a model that has one of the same layers and rank, or refuse it."""
    from peft import set_peft_model_state_dict

    state = {name.removeprefix(_PREFIX): value for name, value in _weights_of(folder).items()}
    if problems := _differences(_adapter_state(model), state):
        raise ValueError(
            f"the adapter in {folder} is of another rank or of other layers; go on with the lora_r and the "
            f"lora_target_modules of its run. ({problems})"
        )
    set_peft_model_state_dict(model, state, adapter_name=ADAPTER)


def merged(model: Any) -> Any:
    """A copy of a model with its adapter added into the weights: the stock network, to save and to share."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    result = copy.deepcopy(model)
    for path, module in list(result.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, name = path.rpartition(".")
            setattr(result.get_submodule(parent), name, module.get_base_layer())
    del result.peft_config
    return result


@torch.no_grad()
def merge_into(model: Any, name: str | Path, *, part: Sequence[nn.Module]) -> Any:
    """Add an adapter into the weights of a model, in place; where it is refused, the model is of no use any more.

    Raises:
        ValueError: If a weight of the adapter is missing, unknown, not finite or of another shape, or if `part` of the
            model stays as it was: then it would pass for a hardened one.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    before = [parameter.clone() for module in part for parameter in module.parameters()]
    config, found = _config_of(name), _weights_of(name)
    unfit = f"the adapter {name} does not fit {type(model).__name__}; it was trained on another class of model, or on "
    unfit += "another part. Pass the model that it was trained on as base=. "
    try:
        adapted = get_peft_model(model, config)
        wanted = _adapter_state(adapted)
        problems = _differences(wanted, found)
        if not problems:
            set_peft_model_state_dict(adapted, found)
            model = adapted.merge_and_unload(safe_merge=True)
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:  # peft has no class of its own
        raise ValueError(f"{unfit}({str(error)[:200]})") from error
    after = [parameter for module in part for parameter in module.parameters()]
    if not problems and all(map(torch.equal, before, after)):
        problems = f"{type(part[0]).__name__} stays as it was"
    if problems:
        raise ValueError(f"{unfit}({problems})")
    return model


def _adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # "auto" would ask the Hub for the original's vocabulary.
    return get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)


def _config_of(name: str | Path) -> Any:
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(name))
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"the {CONFIG_FILE} of {name} can not be read: {type(error).__name__}: {error}") from error
    if config.peft_type is None:
        raise ValueError(f"the {CONFIG_FILE} of {name} does not tell the peft_type: it is not that of an adapter.")
    return config


def _weights_of(name: str | Path) -> dict[str, torch.Tensor]:
    """The weights of an adapter under the names that `peft.PeftModel` gives them."""
    path = next((path for file in _WEIGHTS_FILES if (path := find_file(str(name), file)) is not None), None)
    if path is None:
        raise ValueError(f"the adapter {name} has no {WEIGHTS_FILE}.")
    weights = dict(load_state_dict(path))
    check_weights(weights, str(path))
    return weights


def _differences(wanted: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> str:
    """What of an adapter's weights is missing, unknown or of another shape, in words; empty if nothing is."""
    kinds = {
        "missing adapter keys": sorted(set(wanted) - set(found)),
        "unknown adapter keys": sorted(set(found) - set(wanted)),
        "of another shape": sorted(key for key in set(wanted) & set(found) if wanted[key].shape != found[key].shape),
    }
    return ", ".join(f"{len(keys)} {kind}: {keys[0]}" for kind, keys in kinds.items() if keys)


def _target_pattern(encoder: nn.Module, names: Sequence[str] | None) -> str:
    """A pattern of the whole paths of the linear layers that train, for `LoraConfig.target_modules`.

    A mere list of names such as `q_proj` would hit the text tower as well.
    """
    # Torch's own attention reads the weight of its `out_proj` past the layer, and so past an adapter there.
    past = {id(module.out_proj) for module in encoder.modules() if isinstance(module, nn.MultiheadAttention)}
    linear = [
        path
        for path, module in encoder.named_modules()
        if isinstance(module, nn.Linear) and module.weight.requires_grad and id(module) not in past
    ]
    last = {path: path.rpartition(".")[2] for path in linear}
    if strange := sorted(set(names or ()) - set(last.values())):
        raise ValueError(
            f"lora_target_modules={strange} are no linear layers that would train; there are {sorted(set(last.values()))}."
        )
    if not linear:
        raise ValueError("use_peft: no linear layer would train, so there is nothing to adapt.")
    return "|".join(re.escape(path) for path in linear if names is None or last[path] in names)
