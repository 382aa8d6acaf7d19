"""Sample records on disk: what makes an evaluation resumable, shared out over processes, and checkable."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hf_robust_vision.files import write_atomically
from hf_robust_vision.processes import barrier, rank_and_world

from .results import SampleRecord, load_samples


SampleId = int | str


@dataclass
class Progress:
    """How far a sample has come."""

    records: list[SampleRecord]  # of the levels that it has behind it, and of the one that it is in
    stage: int | None = None  # searches of that level that it has behind it; None where it has all levels behind it
    harm: float = 0.0  # of its worst image so far

    @property
    def done(self) -> bool:
        """Whether nothing is left to measure."""
        return self.stage is None


@dataclass
class SampleStore:
    """The records of one evaluation: a journal of each process while it runs, at the end one file per level.

    The files' names carry a hash of everything that decides the flags (weights, data, prompts, attacks), so that a
    repeated evaluation goes on only from records that are its own. A sample goes on from the search that it was in.

    Raises:
        ValueError: If a file holds a record that can not be of this evaluation.
    """

    folder: Path | None  # None keeps the records in memory only
    label: str  # readable part of the files' names
    levels: Sequence[float]  # radii or severities in rising order
    identity: Mapping[str, Any]  # plain values that decide the flags
    labels: Mapping[SampleId, int | str]  # the right answer of each sample: a record with another one is refused
    blames: Collection[str]  # what `fooled_by` may be
    progress: dict[SampleId, Progress] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
        slug = re.sub(r"[^A-Za-z0-9.]+", "-", self.label).strip("-")[:120]  # a file name may have 255 bytes
        # Radii may lie near each other: as many digits as tell two floats apart, five where these do.
        short = [f"{level:.5f}" for level in self.levels]
        names = short if len(set(short)) == len(short) else [f"{level:.17g}" for level in self.levels]
        self.names = [f"samples-{slug}-eps{name}-{digest}.jsonl" for name in names]
        self.images = f"images-{slug}-{digest}"
        self._journal = f"samples-{slug}-{digest}.jsonl.journal"
        self.rank, self.world = rank_and_world()
        if self.folder is not None and self.folder.is_dir():
            self._read_finished(self.folder)
            self._read_journals(self.folder)
        barrier()  # every process has read before one of them writes

    def add(self, progress: Mapping[SampleId, Progress], seconds: float) -> None:
        """Keep how far some samples have come, on disk first."""
        self.progress |= progress
        self.seconds += seconds
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({"id": sample} | asdict(state)) for sample, state in progress.items()]
        # On its own line: seconds are of the batch, and add up over restarts.
        lines.append(json.dumps({"seconds": round(seconds, 3)}))
        with (self.folder / f"{self._journal}.rank{self.rank}").open("a", encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))

    def forget(self, samples: Collection[SampleId]) -> None:
        """Drop what is known of some samples, so that they are measured again."""
        self.progress = {sample: state for sample, state in self.progress.items() if sample not in samples}

    def gather(self, order: Sequence[SampleId]) -> dict[SampleId, list[SampleRecord]]:
        """The records of all processes; the main one writes a single file per level, in the given order."""
        if self.world > 1:
            parts: list[Any] = [None] * self.world
            dist.all_gather_object(parts, (self.progress, self.seconds))
            for progress, seconds in parts:
                self.progress |= {sample: state for sample, state in progress.items() if state.done}
                self.seconds = max(self.seconds, seconds)  # they ran side by side
        records = {sample: self.progress[sample].records for sample in order}
        if self.folder is not None and self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for place, name in enumerate(self.names):
                lines = [json.dumps(asdict(records[sample][place])) for sample in order]
                write_atomically(self.folder / name, "".join(f"{line}\n" for line in lines))
            for leftover in self.folder.glob(f"{self._journal}*"):
                leftover.unlink()
            # A repeated call finds all records there and would have taken no time.
            write_atomically(self.folder / self._journal, json.dumps({"seconds": round(self.seconds, 3)}) + "\n")
        barrier()
        return records

    def _read_finished(self, folder: Path) -> None:
        """Records of an evaluation that came to its end."""
        files = [folder / name for name in self.names]
        if not all(file.is_file() for file in files):
            return
        levels = [{record.id: record for record in load_samples(file)} for file in files]
        for file, level in zip(files, levels):
            self._check(file, level.values())
        # Measured again is what a file does not hold: somebody may have cut it.
        shared = set(levels[0]).intersection(*levels[1:])
        self.progress |= {sample: Progress([level[sample] for level in levels]) for sample in shared}

    def _read_journals(self, folder: Path) -> None:
        for file in sorted(folder.glob(f"{self._journal}*")):
            for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    values = json.loads(line)
                    if "id" not in values:
                        self.seconds += float(values["seconds"])
                        continue
                    records = [SampleRecord(**record) for record in values["records"]]
                    state = Progress(records, values["stage"], float(values["harm"]))
                # Only the last line of a killed process can be torn, and it is the only copy of its batch.
                except (ValueError, TypeError, KeyError):
                    continue  # cut off when the process was killed; the sample is measured again
                self._check(file, records)
                known = self.progress.get(values["id"])
                if known is None or not known.done:
                    self.progress[values["id"]] = state

    def _check(self, file: Path, records: Iterable[SampleRecord]) -> None:
        for record in records:
            wrong_label = record.id in self.labels and record.label != self.labels[record.id]
            if wrong_label or record.fooled_by not in (None, "clean", *self.blames):
                raise ValueError(
                    f"{file} holds a record that is not of this measurement: sample {record.id!r} with label "
                    f"{record.label!r} and fooled_by {record.fooled_by!r}. Delete the file to measure again."
                )
