"""What the comparing recipes share: runs in processes of their own, named by their settings."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import torch


RunT = TypeVar("RunT")
FoundT = TypeVar("FoundT")
# Of a trainer that is one of many.
QUIET = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}


def perform_all(
    perform: Callable[[RunT], FoundT],
    runs: Sequence[RunT],
    jobs: int,
    label: Callable[[RunT], str],
    numbers: Callable[[RunT, FoundT], str],
) -> dict[RunT, FoundT]:
    """All runs, `jobs` at a time, one thread each; a line is printed for each.

    Args:
        perform: What a run does; it goes to another process, so it must be picklable.
        runs: Hashable and picklable.
        jobs: Processes.
        label: Names a run.
        numbers: Sums up what it found.

    Raises:
        RuntimeError: If a run failed; the others are finished first.
    """
    done: dict[RunT, FoundT] = {}
    failed = []
    for count, (run, future) in enumerate(_ended(perform, runs, jobs), 1):
        line = f"[{count}/{len(runs)}] {label(run)}: "
        if error := future.exception():
            failed.append(f"{label(run)}: {error}")
            print(f"{line}failed: {error}", file=sys.stderr, flush=True)
            continue
        done[run] = future.result()
        print(f"{line}{numbers(run, done[run])}", flush=True)
    if failed:
        raise RuntimeError("; ".join(failed))
    return done


def _ended(
    perform: Callable[[RunT], FoundT], runs: Sequence[RunT], jobs: int
) -> Iterator[tuple[RunT, Future[FoundT]]]:
    """Each run as it ends; one at a time needs no other process."""
    if jobs == 1:
        torch.set_num_threads(1)
        for run in runs:
            future: Future[FoundT] = Future()
            try:
                future.set_result(perform(run))
            except Exception as error:
                future.set_exception(error)
            yield run, future
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(perform, run): run for run in runs}
        for future in as_completed(futures):
            yield futures[future], future


def digest(settings: Mapping[str, Any]) -> str:
    """Eight characters that name a folder by its settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def words(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Read "a,b,c"."""
    return lambda text: [convert(word) for word in text.split(",") if word]
