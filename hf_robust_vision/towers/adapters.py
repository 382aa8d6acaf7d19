"""LoRA inside a model: whether there is one, its folder, and the model that it is merged into.

All of it goes through peft's own functions. Those that transformers offers on its models refuse the peft that a fresh
install brings.
"""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


ADAPTER = "default"
ADAPTER_FOLDER = "adapter"
CONFIG_FILE, WEIGHTS_FILE = ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_PREFIX = "base_model.model."  # what the paths in a folder have before those in the model


def has_adapter(model: nn.Module) -> bool:
    """Whether any layer of a model is one of peft's."""
    peft: Any = sys.modules.get("peft.tuners.tuners_utils")  # nothing is peft's where it was never imported
    return peft is not None and any(isinstance(module, peft.BaseTunerLayer) for module in model.modules())


def holds_adapter(folder: str | Path) -> bool:
    """Whether a folder is that of an adapter alone."""
    return (Path(folder) / CONFIG_FILE).is_file()


def original_of(folder: str | Path) -> tuple[str, str | None]:
    """Name and revision of the model that an adapter was trained on.

    Args:
        folder: Folder or Hub id of the adapter.

    Raises:
        ValueError: If the adapter does not name it.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    if not config.base_model_name_or_path:
        raise ValueError(f"the adapter {folder} does not name the model that it was trained on: pass base=.")
    return config.base_model_name_or_path, config.revision


def save_adapter(model: Any, folder: str | Path) -> None:
    """Write the adapter of a model alone, as `peft.PeftModel.save_pretrained` does."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    state = {_PREFIX + name: value.contiguous() for name, value in _adapter_state(model).items()}
    save_file(state, Path(folder) / WEIGHTS_FILE, metadata={"format": "pt"})
    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode = True
    config.save_pretrained(str(folder))


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Read the adapter's weights of a checkpoint into a model that has one of the same shape.

    Raises:
        ValueError: If it is that of other layers or of another rank.
    """
    from peft import set_peft_model_state_dict

    found = load_file(Path(folder) / WEIGHTS_FILE)
    state = {name.removeprefix(_PREFIX): value for name, value in found.items()}
    shapes = {name: value.shape for name, value in _adapter_state(model).items()}
    if {name: value.shape for name, value in state.items()} != shapes:
        raise ValueError(
            f"the adapter in {folder} is of another rank or of other layers; go on with the lora_r and the "
            "lora_target_modules of its run."
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
def merge_into(model: Any, folder: str | Path, *, part: nn.Module | None = None) -> Any:
    """Add the adapter of a folder into the weights of a model, in place.

    Args:
        model: Of the class that the adapter was trained on.
        folder: Folder or Hub id of the adapter.
        part: What of the model the adapter has to change; by default anything of it.

    Raises:
        ValueError: If the adapter does not fit, or leaves `part` as it was.
    """
    from peft import PeftModel

    part = model if part is None else part
    before = {name: value.clone() for name, value in part.state_dict().items()}
    wrong = "what is wanted stays as it was"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            result = PeftModel.from_pretrained(model, str(folder)).merge_and_unload(safe_merge=True)
            fits = any(not torch.equal(before[name], value) for name, value in part.state_dict().items())
        except (UserWarning, RuntimeError) as error:
            fits, wrong = False, str(error)[:200]
    if not fits:
        raise ValueError(
            f"the adapter {folder} does not fit {type(model).__name__}; it was trained on another class of model, or on "
            f"another part. Pass the model that it was trained on as base=. ({wrong})"
        )
    return result


def _adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # "auto" would ask the Hub for the original's vocabulary.
    return get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
