"""What a swap did, in numbers, with the way back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_robust_vision.files import write_atomically
from hf_robust_vision.towers.records import SWAP_REPORT

from .journal import LOCK, Journal


@dataclass(frozen=True)
class TowerReport:
    """One tower before and after. Drift and error are None where they were not measured."""

    path: str  # its dotted name in the model
    parameters: int
    changed: int  # how many of them have another value now
    unread: int  # how many the VLM never reads, as far as its config tells
    unread_names: list[str]
    # Mean cosine of old and new clean patch tokens at the layers that the VLM reads, 1 is no drift; and the largest
    # relative difference of what the tower computes to the source, over all layers.
    drift: float | None
    output_error: float | None
    sha256_before: str  # of the old weights
    sha256_after: str
    # How many weights of the old tower differ from the model that the source was trained from: 0 where the VLM left its
    # tower as it was published. None where the source does not tell: only an adapter names its original.
    off_original: int | None = None


@dataclass
class SwapReport:
    """What `swap_vision_encoder` did."""

    model: str  # class of the VLM
    source: str  # where the weights come from
    resize: str  # how different image sizes were reconciled
    image_size: int  # of the tower now
    towers: list[TowerReport]
    checks: list[str]  # what was checked, in words
    warnings: list[str]  # what the reader should know
    versions: dict[str, str]  # of the libraries
    original: str | None = None  # folder's name or Hub id of the VLM; None where it was in memory
    _journal: Journal | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the way back, fit for JSON."""
        fields = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {"schema": 1, **fields, "towers": [asdict(tower) for tower in self.towers]}

    def provenance(self) -> dict[str, dict[str, Any]]:
        """The part that is written into the VLM's config: an entry a tower, by its path."""
        kept = {name: getattr(self, name) for name in ("source", "resize", "image_size", "versions")}
        hashes = ("path", "sha256_before", "sha256_after")
        return {tower.path: {name: getattr(tower, name) for name in hashes} | kept for tower in self.towers}

    def __str__(self) -> str:
        lines = [f"{self.model}: tower of {self.source}, {self.image_size} px; checked: {', '.join(self.checks)}"]
        for tower in self.towers:
            drift = "" if tower.drift is None else f"; clean patch tokens, old to new: mean cosine {tower.drift:.3f}"
            lines.append(f"{tower.path}: {tower.changed:,} of {tower.parameters:,} weights changed{drift}")
        return "\n".join(lines)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy: without the way back, which would lead to copies of the towers, and leave the VLM as it is."""
        return vars(self) | {"_journal": None}

    def save(self, path: str | Path) -> Path:
        """Write `swap_report.json` into a folder, usually that of the saved VLM, and return its path."""
        target = Path(path) / SWAP_REPORT
        write_atomically(target, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        return target

    def restore(self) -> None:
        """Bring the old tower back bit for bit, with its settings, its processor's sizes and the VLM's config.

        Raises:
            RuntimeError: If it was brought back before, another swap has changed the tower since, or this is a copy.
        """
        with LOCK:
            if self._journal is None:
                raise RuntimeError(
                    "nothing to restore: the old tower was brought back already, or this report is a copy, which has "
                    "no way back: call restore() of the report that swap_vision_encoder returned."
                )
            if not self._journal.latest:
                raise RuntimeError(
                    "another swap has changed the tower since: call restore() of the latest report first, then this "
                    "one's."
                )
            self._journal.undo()
            self._journal = None
