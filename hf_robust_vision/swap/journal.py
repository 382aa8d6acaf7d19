"""Write every change of a swap down, so that it can be taken back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


_ABSENT: Any = object()
_SIGNATURE = "_robust_vision_swap"  # the attribute of a module that was changed


class Journal:
    """A list of changes, undone in reverse order.

    Weights are kept as copies on the CPU, other values as they were.
    """

    def __init__(self) -> None:
        self._weights: list[tuple[nn.Parameter, Tensor]] = []
        self._values: list[tuple[Any, str, Any]] = []
        self._signature, self._signed = object(), list[nn.Module]()

    def sign(self, module: nn.Module) -> None:
        """Mark a module as changed by this journal; a later journal may put its own mark over it."""
        self._signed.append(module)
        self.set(module, _SIGNATURE, self._signature)

    @property
    def latest(self) -> bool:
        """Whether no other journal has changed the signed modules since."""
        return all(getattr(module, _SIGNATURE, None) is self._signature for module in self._signed)

    def copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Copy `value` into `parameter`, which keeps its dtype, device, flags and hooks."""
        self._weights.append((parameter, parameter.detach().cpu().clone()))
        with torch.no_grad():
            parameter.copy_(value)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute; a dict's key is set with the same call."""
        if isinstance(owner, dict):
            self._values.append((owner, name, owner.get(name, _ABSENT)))
            owner[name] = value
            return
        self._values.append((owner, name, getattr(owner, name, _ABSENT)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Take everything back and forget it; weights follow the model to where it is now."""
        while self._values:
            owner, name, value = self._values.pop()
            if isinstance(owner, dict):
                owner.pop(name) if value is _ABSENT else owner.update({name: value})
            elif value is _ABSENT:
                if hasattr(owner, name):
                    delattr(owner, name)
            else:
                now = getattr(owner, name, None)
                if isinstance(value, nn.Parameter) and isinstance(now, Tensor):
                    value.data = value.data.to(device=now.device, dtype=now.dtype)
                elif isinstance(value, Tensor) and isinstance(now, Tensor):
                    value = value.to(now.device)
                setattr(owner, name, value)
        with torch.no_grad():
            while self._weights:
                parameter, old = self._weights.pop()
                parameter.copy_(old)
