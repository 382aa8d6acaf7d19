"""The folder of a run: fresh, gone on with, or rid of an earlier run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from hf_robust_vision.processes import barrier, rank_and_world
from hf_robust_vision.training.checkpoints import complete_checkpoint


# What tells an earlier run from somebody's files.
SIGNS = ("robustness.json", "checkpoint-*", "samples-*.jsonl*", "training_args.bin")


def check_folder(
    folder: Path, resume: str | bool | None, *, overwrite: bool, reads: Sequence[str | None] = ()
) -> str | None:
    """Refuse a folder that holds a run or no checkpoint to resume, and change nothing.

    Args:
        folder: Of the run that begins.
        resume: True or "true" for the last complete checkpoint of `folder`, a path, or nothing to start anew.
        overwrite: Whether `clear` may delete an earlier run.
        reads: Folders that this run reads; what is no folder is left out.

    Returns:
        The checkpoint to go on from.

    Raises:
        ValueError: If there is none, or `folder` is not free and may not be cleared.
    """
    if resume:
        place = folder if str(resume).lower() == "true" else Path(str(resume))
        found = complete_checkpoint(place)
        # A run killed before its first checkpoint has sample records to go on from, and nothing else.
        if found is None and (place != folder or not folder.is_dir()):
            raise ValueError(f"{place} holds no complete checkpoint to resume.")
        return found
    if overwrite:
        _check_clear(folder, reads)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} already holds a run; pass --resume_from_checkpoint true to go on, --overwrite true to "
            "delete it, or another --output_dir."
        )
    return None


def clear(folder: Path) -> None:
    """Delete an earlier run; every process waits until it is gone."""
    if rank_and_world()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    barrier()


def _check_clear(folder: Path, reads: Sequence[str | None]) -> None:
    """Refuse to delete what is no run, or what this run reads."""
    if folder.exists() and any(folder.iterdir()) and not any(list(folder.glob(sign)) for sign in SIGNS):
        raise ValueError(f"--overwrite true deletes an earlier run, but {folder} does not look like one; delete it.")
    for name in (*reads, "."):
        if name is not None and Path(name).exists() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--overwrite true would delete {name}, which lies in {folder}; choose another folder.")
