"""Which checkpoints were written to their end, and what a run that goes on from one has to find as it was.

What says that a checkpoint is complete is its manifest, written last: the SHA-256 of its files, and its `Setting`s.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from hf_robust_vision.files import file_sha256, write_atomically


MANIFEST = "checkpoint_complete"


class Setting(NamedTuple):
    """Something that decides what is learnt: the value that counts, and what to type to have it."""

    value: Any
    typed: str


def is_checkpoint(folder: str | Path) -> bool:
    """Whether a folder has the name of a checkpoint."""
    return Path(folder).name.removeprefix("checkpoint-").isdecimal()


def mark_complete(checkpoint: str | Path, settings: Mapping[str, Setting]) -> None:
    """Say that every process has written its part of a checkpoint, and with which settings it was trained."""
    folder = Path(checkpoint)
    unmark(folder)
    written = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    # By hash: a copy that was cut off, or a disk that filled up, leaves files which load and hold other numbers.
    files = {file.relative_to(folder).as_posix(): file_sha256(file) for file in written}
    write_atomically(folder / MANIFEST, json.dumps({"files": files, "settings": settings}, indent=1) + "\n")


def unmark(checkpoint: str | Path) -> None:
    """Say that a checkpoint is about to be written again."""
    (Path(checkpoint) / MANIFEST).unlink(missing_ok=True)


def complete_checkpoint(place: str | Path) -> str | None:
    """The checkpoint itself if it is complete, or the last complete one of a run's folder; None if there is none.

    A run that is killed while it saves leaves a folder that looks like the latest checkpoint and can not be loaded.
    """
    place = Path(place)
    if (place / MANIFEST).is_file():
        return str(place)
    complete = _complete(place)
    return str(complete[-1]) if complete else None


def resumable_checkpoint(place: str | Path) -> str:
    """As `complete_checkpoint`, or a ValueError if there is none or its files are not what was written."""
    found = complete_checkpoint(place)
    if found is None:
        raise ValueError(f"{place} holds no complete checkpoint to resume.")
    if fault := fault_of(found):
        # Named, never taken unasked: somebody who wants step 900 would not notice that step 800 was loaded.
        earlier = takewhile(lambda path: path.name != Path(found).name, _complete(Path(found).parent))
        whole = [path for path in earlier if fault_of(path) is None]
        way = "no earlier one is whole: start anew in another --output_dir."
        if whole:
            way = f"to go on from the one before it, type --resume_from_checkpoint {whole[-1]}."
        raise ValueError(f"{fault}; {way}")
    return found


def fault_of(checkpoint: str | Path) -> str | None:
    """What is wrong with the files of a complete checkpoint; None for nothing."""
    folder = Path(checkpoint)
    try:
        files = _manifest(folder)["files"]
    except ValueError as error:
        return str(error)
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if file_sha256(folder / name) != sha256:
            return f"{folder / name} is damaged: it is not what was written"
    # DeepSpeed and FSDP2 have other names for it than `Trainer`.
    if not any("optim" in name for name in files):
        return f"{folder} holds no optimizer, as --save_only_model true leaves it out"
    return None


def need_settings(checkpoint: str | Path, settings: Mapping[str, Setting]) -> None:
    """Refuse to go on from a checkpoint under other settings: what the run's record says would hold for a part of it."""
    # A setting that the checkpoint does not know was added in a later version, and is not compared. Both sides go
    # through JSON, which makes lists of tuples.
    old = {name: Setting(*value) for name, value in _manifest(Path(checkpoint))["settings"].items()}
    new = {name: Setting(*value) for name, value in json.loads(json.dumps(settings)).items()}
    if differing := [name for name in old if name in new and new[name].value != old[name].value]:
        was, now = (", ".join(each[name].typed for name in differing) for each in (old, new))
        raise ValueError(
            f"{checkpoint} was trained with {was}, and this run has {now}; go on with {was}, or start anew in another "
            "--output_dir."
        )


def rotate(run: str | Path, limit: int | None, *, best: str | None) -> None:
    """Delete the oldest complete checkpoints beyond `limit` (None: none), never the best and never the latest."""
    # What has no manifest stays: nobody knows what it is.
    if limit is None or limit <= 0:
        return
    complete = _complete(Path(run))
    kept = {complete[-1].name} | ({Path(best).name} if best is not None else set())
    spare = [path for path in complete if path.name not in kept]
    for path in spare[: max(len(complete) - limit, 0)]:
        shutil.rmtree(path)


def _complete(run: Path) -> list[Path]:
    found = [path for path in run.glob("checkpoint-*") if is_checkpoint(path) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))  # by letters, 100 is before 20


def _manifest(checkpoint: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        if set(manifest) == {"files", "settings"} and all(isinstance(part, dict) for part in manifest.values()):
            return manifest
    except (ValueError, TypeError):
        pass
    raise ValueError(
        f"{checkpoint / MANIFEST} is no manifest: it is damaged, or of an earlier version of this package, which alone "
        "can go on from it"
    )
