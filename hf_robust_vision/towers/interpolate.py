"""Between an original and its hardened model: weights on the straight line from the one to the other."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor

from hf_robust_vision.files import write_atomically

from .base import weights_sha256
from .load import Encoder, load_encoder
from .records import INTERPOLATE_REPORT
from .vlm import VLMEncoder
from .weights import check_weights, need_free


_NOT_THE_NETWORK = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")


def interpolate_encoders(original: Encoder, hardened: Encoder, weight: float) -> Encoder:
    """A new encoder with the weights `(1 - weight) * original + weight * hardened`; both ends are exact, bit for bit.

    Clean accuracy mostly lies near the original and robust accuracy near the hardened model, so one number, chosen on
    validation data, trades them after training. It costs nothing at run time.

    Args:
        original: What was hardened.
        hardened: What came out, an adapter merged into it; the result lies on its device.
        weight: Share of the hardened model, 0 to 1.

    Raises:
        ValueError: If the weight is outside [0, 1], or the two are not of one class, config, image size and shape.

    Reference:
        WiSE-FT, https://huggingface.co/papers/2109.01903, which does it for models fine-tuned without attacks.
    """
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be at least 0 (the original) and at most 1 (the hardened model), got {weight}.")
    _need_alike(original, hardened)
    mixed, own, other = copy.deepcopy(hardened), original.state_dict(), hardened.state_dict()
    state = {name: _between(own[name].to(value.device), value, weight) for name, value in other.items()}
    check_weights(state, f"the model at weight {weight:g}")
    for name, parameter in [*mixed.named_parameters(), *mixed.named_buffers()]:
        if name in state:
            parameter.data = state[name]
    return mixed


def interpolate(original: str | Path, hardened: str | Path, output_dir: str | Path, *, weight: float) -> Path:
    """Write the stock folder of a model between two folders or Hub ids, see `interpolate_encoders`.

    Of a vision-language model tower and projector are between; the rest, the same in both, is copied bit for bit. The
    processor is that of the hardened one. `interpolate_report.json` holds both parents with the hashes of their weights.

    Raises:
        ValueError: As `interpolate_encoders`, if a model can not be read whole, or `output_dir` holds anything. Nothing
            is written then.
    """
    folder = need_free(output_dir)
    first, last = (load_encoder(name, dtype="auto") for name in (original, hardened))
    _need_alike(first, last)
    if isinstance(last, VLMEncoder) and first.origin.rest_sha256(first) != last.origin.rest_sha256(last):
        raise ValueError(f"the language models of {original} and {hardened} differ: name the VLM that was hardened.")
    mixed = interpolate_encoders(first, last, weight)
    processor = None if isinstance(last, VLMEncoder) else AutoProcessor.from_pretrained(str(hardened))
    mixed.save_pretrained(folder)
    if processor is not None:  # a VLM's lies beside its weights, and came along
        processor.save_pretrained(folder)
    parents = {"original": _parent(original, first), "hardened": _parent(hardened, last)}
    record = {"schema": 1, **parents, "weight": weight, "sha256": weights_sha256(mixed), "vlm": processor is None}
    write_atomically(folder / INTERPOLATE_REPORT, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    return folder


def _parent(name: str | Path, encoder: Encoder) -> dict[str, str]:
    """A parent by its Hub id or the name of its folder, and by its weights."""
    path = Path(name)
    return {"model": path.resolve().name if path.is_dir() else str(name), "sha256": weights_sha256(encoder)}


def _between(original: Tensor, hardened: Tensor, weight: float) -> Tensor:
    dtype = torch.promote_types(original.dtype, hardened.dtype)
    if weight in (0, 1):  # by itself: a sum would turn -0.0 into 0.0
        return (hardened if weight else original).to(dtype, copy=True)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.lerp(original.to(wide), hardened.to(wide), weight).to(dtype)


def _need_alike(original: Encoder, hardened: Encoder) -> None:
    if original.stock_class is not hardened.stock_class:
        names = [each.stock_class.__name__ for each in (original, hardened)]
        raise ValueError(f"there is nothing between a {names[0]} and a {names[1]}; name the model that was hardened.")
    configs = [_settings(each.config.to_dict()) for each in (original, hardened)]
    configs[0]["images"], configs[1]["images"] = (repr(each.transform) for each in (original, hardened))
    for name in sorted(set(configs[0]) | set(configs[1])):
        one, other = (config.get(name) for config in configs)
        if one != other:
            raise ValueError(f"{name} is {one} in the original and {other} in the hardened model: they are no pair.")
    states = [{name: tuple(value.shape) for name, value in each.state_dict().items()} for each in (original, hardened)]
    if unlike := sorted(set(states[0].items()) ^ set(states[1].items())):
        raise ValueError(f"the shapes of {unlike[0][0]} differ in the original and the hardened model.")


def _settings(config: dict[str, Any], start: str = "") -> dict[str, Any]:
    """What of a config decides what a network computes, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name in _NOT_THE_NETWORK:
            continue
        if isinstance(value, dict):
            found |= _settings(value, f"{start}{name}.")
        else:
            found[f"{start}{name}"] = json.loads(json.dumps(value, default=str))
    return found
