"""Which checkpoints were written to their end."""

from __future__ import annotations

import re
import shutil
from pathlib import Path


_MARKER = "checkpoint_complete"
_NUMBER = re.compile(r"^checkpoint-(\d+)$")


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return _NUMBER.match(Path(folder).name) is not None


def mark_complete(checkpoint: str | Path) -> None:
    """Say that every process has written its part of a checkpoint."""
    (Path(checkpoint) / _MARKER).touch()


def unmark(checkpoint: str | Path) -> None:
    """Say that a checkpoint is about to be written again."""
    (Path(checkpoint) / _MARKER).unlink(missing_ok=True)


def rotate(run: str | Path, limit: int | None, *, best: str | None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`, never the best and never the latest.

    Args:
        run: Folder of the run.
        limit: How many to keep; None keeps all.
        best: The best checkpoint so far.
    """
    if limit is None or limit <= 0:
        return
    kept = {Path(best).name} if best is not None else set()
    complete = [path for path in _numbered(run) if (path / _MARKER).is_file()]
    kept.add(complete[-1].name)
    spare = [path for path in complete if path.name not in kept]
    for path in spare[: max(len(complete) - limit, 0)]:
        shutil.rmtree(path)


def complete_checkpoint(place: str | Path) -> str | None:
    """The checkpoint itself if it is complete, or the last complete one of a run's folder; None if there is none.

    A run that is killed while it saves leaves a folder that looks like the latest checkpoint and can not be loaded.
    """
    place = Path(place)
    if (place / _MARKER).is_file():
        return str(place)
    complete = [path for path in _numbered(place) if (path / _MARKER).is_file()]
    return str(complete[-1]) if complete else None


def _numbered(run: str | Path) -> list[Path]:
    found = [(int(match[1]), path) for path in Path(run).glob("checkpoint-*") if (match := _NUMBER.search(path.name))]
    return [path for _, path in sorted(found)]
