"""What the comparing recipes share: runs in processes of their own, named by their settings."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = {pool.submit(perform, run): run for run in runs}
        for count, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            line = f"[{count}/{len(futures)}] {label(run)}: "
            if error := future.exception():
                failed.append(f"{label(run)}: {error}")
                print(f"{line}failed: {error}", file=sys.stderr, flush=True)
                continue
            done[run] = future.result()
            print(f"{line}{numbers(run, done[run])}", flush=True)
    if failed:
        raise RuntimeError("; ".join(failed))
    return done


def digest(settings: Mapping[str, Any]) -> str:
    """Eight characters that name a folder by its settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def words(convert: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Read "a,b,c"."""
    return lambda text: [convert(word) for word in text.split(",") if word]
