"""Which checkpoints were written to their end."""

from __future__ import annotations

import re
from pathlib import Path


_MARKER = "checkpoint_complete"
_NUMBER = re.compile(r"^checkpoint-(\d+)$")


def mark_complete(checkpoint: str | Path) -> None:
    """Say that every process has written its part of a checkpoint."""
    (Path(checkpoint) / _MARKER).touch()


def complete_checkpoint(place: str | Path) -> str | None:
    """The checkpoint itself if it is complete, or the last complete one of a run's folder; None if there is none.

    A run that is killed while it saves leaves a folder that looks like the latest checkpoint and can not be loaded.
    """
    place = Path(place)
    if (place / _MARKER).is_file():
        return str(place)
    numbered = [(int(match[1]), path) for path in place.glob("checkpoint-*") if (match := _NUMBER.search(path.name))]
    complete = [(number, path) for number, path in numbered if (path / _MARKER).is_file()]
    return str(max(complete)[1]) if complete else None
