"""The folder of a run: fresh, gone on with, or in the place of an earlier run, which stays until it is replaced."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from glob import escape
from itertools import count
from pathlib import Path

from hf_robust_vision.processes import barrier, rank_and_world
from hf_robust_vision.training.checkpoints import complete_checkpoint


# What tells an earlier run from somebody's files.
SIGNS = ("robustness.json", "checkpoint-*", "samples-*.jsonl*", "training_args.bin")


def check_folder(
    folder: Path, resume: str | bool | None, *, overwrite: bool, reads: Sequence[str | None] = ()
) -> str | None:
    """Refuse a folder that holds a run or no checkpoint to resume, and change nothing; say what a killed run left aside.

    `resume` is True or "true" for the last complete checkpoint of `folder`, a path, or nothing to start anew; it returns
    the checkpoint to go on from, if any. With `overwrite`, what holds one of the paths that the run `reads` stays.
    """
    # A process that is killed outright can not put back what it moved aside.
    for aside in sorted(folder.absolute().parent.glob(f"{escape(folder.name)}.old-*")):
        if rank_and_world()[0] == 0:
            said = "holds an earlier run that another was to replace: move it back, or delete it."
            print(f"{aside} {said}", file=sys.stderr)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; name a folder.")
    if resume:
        place = folder if str(resume).lower() == "true" else Path(str(resume))
        found = complete_checkpoint(place)
        # A run killed before its first checkpoint has sample records to go on from, and nothing else.
        if found is None and (place != folder or not folder.is_dir()):
            raise ValueError(f"{place} holds no complete checkpoint to resume.")
        return found
    if overwrite:
        _check_replaceable(folder, reads)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} already holds a run; pass --resume_from_checkpoint true to go on, --overwrite true to "
            "delete it, or another --output_dir."
        )
    return None


@contextmanager
def run_folder(folder: Path, *, overwrite: bool) -> Iterator[Callable[[Sequence[str]], None]]:
    """Keep a folder for a run, and what an earlier run left in it safe until there is something in its stead.

    With `overwrite` the earlier run is moved aside, to `<folder>.old-1`. If this one fails or is told to end, it comes
    back as it was, unless there are checkpoints to go on from: then both stay, and a line says where. Every process
    must enter.

    Yields:
        What to call with the names of the files that hold the results, when they are written: from then on the earlier
        run is gone. It raises a ValueError if the folder or one of the files was deleted meanwhile.
    """
    first, folder = rank_and_world()[0] == 0, folder.resolve()
    aside = _set_aside(folder) if first and overwrite and folder.exists() else None
    here = -1

    def replaced(files: Sequence[str]) -> None:
        nonlocal aside
        lost = [name for name in files if not (folder / name).is_file()]
        if not folder.is_dir() or not os.path.samestat(os.fstat(here), os.stat(folder)):
            lost = [str(folder)]
        if lost:
            raise ValueError(f"{lost[0]} was deleted while the run went on, and what it held is lost; start again.")
        old, aside = aside, None  # first, so that an end amidst the deletion puts no half of a run back
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    try:
        with _told_to_end() if aside is not None else nullcontext():
            if first:
                folder.mkdir(parents=True, exist_ok=True)
            barrier()
            here = os.open(folder, os.O_RDONLY)  # while it is open, no other folder gets its number
            yield replaced
    finally:
        if here >= 0:
            os.close(here)
        if aside is not None:
            _put_back(folder, aside)


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Let SIGTERM be an exception: where one process fails, a launcher ends the others so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # no other thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: told to end"))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _set_aside(folder: Path) -> Path:
    for number in count(1):
        aside = folder.with_name(f"{folder.name}.old-{number}")
        if not aside.exists():  # one that a killed run left is kept
            break
    try:
        return folder.rename(aside)
    except OSError as error:  # the root of a volume, or a parent that may not be written
        raise ValueError(
            f"the earlier run can not be moved to {aside} ({error}); name another --output_dir."
        ) from error


def _put_back(folder: Path, aside: Path) -> None:
    if folder.is_dir() and complete_checkpoint(folder) is not None:
        print(f"{folder} keeps the checkpoints of this run, {aside} the earlier run.", file=sys.stderr)
        return
    if folder.exists():
        # Renamed before it is deleted: a second interruption then still finds the way free.
        folder.rename(failed := aside.with_name(f"{aside.name}.failed"))
        shutil.rmtree(failed, ignore_errors=True)
    aside.rename(folder)


def _check_replaceable(folder: Path, reads: Sequence[str | None]) -> None:
    """Refuse to replace what is no run, or what this run reads."""
    if folder.exists() and any(folder.iterdir()) and not any(list(folder.glob(sign)) for sign in SIGNS):
        raise ValueError(f"--overwrite true deletes an earlier run, but {folder} does not look like one; delete it.")
    for name in (*reads, "."):
        if name is not None and Path(name).exists() and Path(name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--overwrite true would delete {name}, which lies in {folder}; choose another folder.")
