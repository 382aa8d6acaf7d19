"""Sample records on disk: what makes an evaluation resumable, shared out over processes, and checkable."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm.auto import tqdm

from .results import SampleRecord, write_atomically


SampleId = int | str
Records = dict[SampleId, list[SampleRecord]]  # one record per radius


class SampleStore:
    """The records of one evaluation: one file per radius, appended to batch by batch.

    The files' names carry a hash of everything that decides the flags (weights, data, prompts, attacks), so that a
    repeated evaluation goes on only from records that are its own.

    Args:
        folder: Where the files lie; None keeps the records in memory only.
        label: Readable part of the files' names.
        eps: Radii in rising order.
        identity: Plain values that decide the flags.
    """

    def __init__(self, folder: str | Path | None, label: str, eps: Sequence[float], identity: Mapping[str, Any]):
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-")
        self.names = [f"samples-{slug}-eps{radius:.5f}-{digest}.jsonl" for radius in eps]
        self.images = f"images-{slug}-{digest}"
        self.folder = Path(folder) if folder is not None else None
        self.rank, self.world = rank_and_world()
        self.records: Records = self._load()
        barrier()  # every process has read before one of them writes

    def add(self, records: Records) -> None:
        """Keep the records of one batch, on disk first."""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            for place, name in enumerate(self.names):
                lines = [json.dumps(asdict(rows[place])) for rows in records.values()]
                with (self.folder / f"{name}.rank{self.rank}").open("a", encoding="utf-8") as file:
                    file.write("".join(f"{line}\n" for line in lines))
        self.records |= records

    def forget(self, samples: Collection[SampleId]) -> None:
        """Drop the records of some samples, so that they are measured again."""
        self.records = {sample: rows for sample, rows in self.records.items() if sample not in samples}

    def gather(self, order: Sequence[SampleId]) -> Records:
        """The records of all processes; the main one writes a single file per radius, in the given order."""
        if self.world > 1:
            parts: list[Any] = [None] * self.world
            dist.all_gather_object(parts, self.records)
            for part in parts:
                self.records |= part
        if self.folder is not None and self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for place, name in enumerate(self.names):
                lines = [json.dumps(asdict(self.records[sample][place])) for sample in order]
                write_atomically(self.folder / name, "".join(f"{line}\n" for line in lines))
                for leftover in self.folder.glob(f"{name}.rank*"):
                    leftover.unlink()
        barrier()
        return self.records

    def _load(self) -> Records:
        if self.folder is None or not self.folder.is_dir():
            return {}
        per_radius = [self._read(name) for name in self.names]
        complete = set(per_radius[0]).intersection(*per_radius[1:])
        return {sample: [records[sample] for records in per_radius] for sample in complete}

    def _read(self, name: str) -> dict[SampleId, SampleRecord]:
        assert self.folder is not None
        found: dict[SampleId, SampleRecord] = {}
        for file in sorted(self.folder.glob(f"{name}*")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    record = SampleRecord(**json.loads(line))
                except (json.JSONDecodeError, TypeError):
                    continue  # cut off when the process was killed; the sample is measured again
                found[record.id] = record
        return found


def measure_all(
    store: SampleStore,
    ids: Sequence[SampleId],
    measure: Callable[[list[int]], Records],
    *,
    batch_size: int,
    label: str,
    progress: bool,
) -> Records:
    """Measure what the store does not hold yet, this process's share of it, and gather everybody's records.

    Args:
        store: Where records go, batch by batch.
        ids: Of all samples, in the order of the results.
        measure: Indices into `ids` to records.
        batch_size: Samples measured at once.
        label: Of the progress bar.
        progress: Show it on the main process.

    Raises:
        ValueError: If two samples share an id: one record would count for both.
    """
    if twice := [sample for sample, count in Counter(ids).items() if count > 1]:
        raise ValueError(
            f"{len(twice)} ids name more than one sample ({', '.join(map(repr, twice[:3]))}): give every sample, that "
            "is every question about an image, an id of its own."
        )
    mine = [index for index in range(store.rank, len(ids), store.world) if ids[index] not in store.records]
    bar = tqdm(total=len(mine), desc=label, disable=not progress or store.rank > 0)
    for at in range(0, len(mine), batch_size):
        batch = mine[at : at + batch_size]
        store.add(measure(batch))
        bar.update(len(batch))
    bar.close()
    return store.gather(ids)


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait for all processes, where there are several."""
    if rank_and_world()[1] > 1:
        dist.barrier()
