"""Which checkpoints were written to their end, and with which settings."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any


_MARKER = "checkpoint_complete"
_SETTINGS = "method_settings.json"
_NUMBER = re.compile(r"^checkpoint-(\d+)$")


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return _NUMBER.match(Path(folder).name) is not None


def mark_complete(checkpoint: str | Path, settings: Mapping[str, Any] | None = None) -> None:
    """Say that every process has written its part of a checkpoint, and with which settings it was trained."""
    if settings is not None:
        (Path(checkpoint) / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")
    (Path(checkpoint) / _MARKER).touch()


def need_settings(checkpoint: str | Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint under other settings: what the run's record says would hold for a part of it.

    Args:
        checkpoint: A complete one; without a file of settings nothing is compared.
        settings: What to type to its value, as `mark_complete` got it.

    Raises:
        ValueError: If a value differs.
    """
    file = Path(checkpoint) / _SETTINGS
    old = json.loads(file.read_text()) if file.is_file() else {}
    new = json.loads(json.dumps(settings))
    if differing := [name for name, value in old.items() if name in new and new[name] != value]:
        was, now = (", ".join(f"{name} {_typed(each[name])}" for name in differing) for each in (old, new))
        raise ValueError(
            f"{checkpoint} was trained with {was}, and this run has {now}; go on with {was}, or start anew in another "
            "--output_dir."
        )


def _typed(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


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
