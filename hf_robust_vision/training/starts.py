"""Where the attack on an image begins: where the attack on it ended an epoch before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from hf_robust_vision.attacks import StartNoise


LEVELS = 127  # of eps, to each side: a perturbation is kept as one byte a value


@dataclass(frozen=True)
class CarriedNoise(StartNoise):
    """Starts that are known, and for the other samples `StartNoise` or, without `random`, the clean image."""

    known: dict[int, Tensor] = field(default_factory=dict)
    random: bool = True

    def draw(self, images: Tensor, restart: int = 0) -> Tensor:
        """As `StartNoise.draw`; a perturbation over eps."""
        fresh = super().draw(images, restart)
        drawn = fresh if self.random else torch.zeros_like(fresh)
        rows = [row for row, sample in enumerate(self.ids) if sample in self.known]
        if rows:
            known = torch.stack([self.known[int(self.ids[row])] for row in rows])
            drawn[rows] = known.to(drawn.device).to(drawn.dtype) / LEVELS
        return drawn


class CarriedStarts:
    """Remembers the latest Linf perturbation of each sample, in so many mebibytes of the CPU's memory.

    Every process remembers those of all, so that a sample begins where it ended whichever process has it next. A
    perturbation takes a byte a value, and is rounded to `eps / 127`. It is that of the same pixels: it says nothing of
    an image that is augmented anew.

    Args:
        mebibytes: Of each process; samples for which there is no room start afresh each time.
        eps: Radius of the attack.
        dataset: Whose samples keep their ids.

    Raises:
        ValueError: For a stream, whose ids name no samples.

    Reference:
        ATTA, https://huggingface.co/papers/1912.11969.
    """

    def __init__(self, mebibytes: int, eps: float, dataset: Any):
        if isinstance(dataset, IterableDataset):
            raise ValueError("carry_starts_mb needs samples that keep their ids; for a stream type 0.")
        self._room, self._eps = mebibytes * 2**20, eps
        self._starts: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def noise(self, fresh: StartNoise, *, random: bool) -> CarriedNoise:
        """The starts of a batch; those that are not known are `fresh` if `random`, else the clean images."""
        return CarriedNoise(fresh.seed, fresh.ids, fresh.step, self._starts, random)

    def remember(
        self, ids: Tensor, images: Tensor, adversarial: Tensor, gather: Callable[[Tensor], Tensor] = lambda part: part
    ) -> None:
        """Keep where the attack on each image of a batch ended; `gather` joins a tensor of all processes."""
        rounded = ((adversarial.detach() - images) / self._eps * LEVELS).round().clamp(-LEVELS, LEVELS)
        samples, starts = gather(ids).cpu(), gather(rounded.to(torch.int8)).cpu()
        # By id: where there is room for some of a batch only, which ones does not depend on the processes.
        for row in samples.argsort().tolist():
            sample, start = int(samples[row]), starts[row]
            if sample not in self._starts:
                if start.nbytes > self._room:
                    continue
                self._room -= start.nbytes
            self._starts[sample] = start.clone()  # not a view of its batch

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        ids = torch.tensor(list(self._starts), dtype=torch.int64)
        starts = torch.stack(list(self._starts.values())) if self._starts else torch.zeros(0, dtype=torch.int8)
        return {"starts_ids": ids, "starts": starts}

    def take(self, state: dict[str, Tensor]) -> None:
        """Go on with what `state` gave."""
        self._room += sum(start.nbytes for start in self._starts.values())
        self._starts = {sample: start.clone() for sample, start in zip(state["starts_ids"].tolist(), state["starts"])}
        self._room -= sum(start.nbytes for start in self._starts.values())
