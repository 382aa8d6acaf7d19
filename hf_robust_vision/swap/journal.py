"""Write every change of a swap down, so that it can be taken back.

A swap is a transaction: what can be checked is checked first, then each change is noted before it is made, and whatever
goes wrong, be it an interrupt, takes all of them back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


# One for all models: two wrappers may hold the same tower, and a swap takes seconds.
LOCK = threading.RLock()

PROVENANCE = "robust_vision_swap"  # the key in the VLM's config

_ABSENT: Any = object()
_SIGNATURE = "_robust_vision_swap"  # the attribute of a module that was changed


class Journal:
    """A list of changes, undone in reverse order, since a later one may rest on an earlier one."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._signature, self._signed = object(), list[nn.Module]()

    def sign(self, module: nn.Module) -> None:
        """Mark a module as changed by this journal; a later journal may put its own mark over it."""
        # The mark tells who changed it last. Copies of old weights know nothing of what came after them: brought back
        # under a later swap they would mix two towers.
        self._signed.append(module)
        self.set(module, _SIGNATURE, self._signature)

    @property
    def latest(self) -> bool:
        """Whether no other journal has changed the signed modules since."""
        return all(getattr(module, _SIGNATURE, None) is self._signature for module in self._signed)

    def copy(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Copy `value` into `parameter`, which keeps its dtype, device, flags and hooks."""
        # Kept on the CPU, since a GPU that holds the VLM may have no room for another tower.
        old = parameter.detach().cpu().clone()
        self._undo.append(lambda: parameter.copy_(old))
        with torch.no_grad():
            parameter.copy_(value)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute."""
        old = getattr(owner, name, _ABSENT)

        def undo() -> None:
            now = getattr(owner, name, None)
            if old is _ABSENT:
                vars(owner).pop(name, None)
                return
            # The model may have been moved or cast since: a tensor that comes back follows it.
            if isinstance(old, Tensor) and isinstance(now, Tensor):
                old.data = old.data.to(device=now.device, dtype=now.dtype)
            setattr(owner, name, old)

        self._undo.append(undo)
        setattr(owner, name, value)

    def record(self, config: Any, towers: dict[str, dict[str, Any]]) -> None:
        """Write into a VLM's config where the weights of some towers, by their paths, come from; others stay."""
        old = provenance(config)

        def undo() -> None:
            # Each tower goes its own way back: they may be swapped by several calls, and restored in any order. So not
            # the old record as a whole, but only what it said of these towers.
            now = provenance(config).items()
            _write(config, {p: old.get(p) if p in towers else told for p, told in now if p not in towers or p in old})

        self._undo.append(undo)
        _write(config, old | towers)

    def undo(self) -> None:
        """Take everything back and forget it."""
        with torch.no_grad():
            while self._undo:
                self._undo.pop()()


def provenance(config: Any) -> dict[str, dict[str, Any]]:
    """Where the towers' weights come from, by the path of the tower, as the config of a swapped VLM tells it."""
    told = getattr(config, PROVENANCE, None) or {"towers": []}
    shared = {name: value for name, value in told.items() if name != "towers"}  # as earlier versions wrote it
    return {tower["path"]: shared | tower for tower in told["towers"]}


def _write(config: Any, towers: dict[str, Any]) -> None:
    if towers:
        setattr(config, PROVENANCE, {"towers": list(towers.values())})
    else:
        vars(config).pop(PROVENANCE, None)
