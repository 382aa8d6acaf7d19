"""Random starts that belong to a sample, not to a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class StartNoise:
    """Noise drawn from (seed, step, sample id, restart or stream) and nothing else.

    A sample starts from the same point whatever its batch, rank, accumulation or resume, and the global random
    state is neither read nor advanced.

    Args:
        seed: Seed of the run.
        ids: One id per image of the batch, whole numbers or texts.
        step: Global training step; 0 in an evaluation.
    """

    seed: int
    ids: Sequence[int | str]
    step: int = 0

    def draw(self, images: Tensor, restart: int = 0) -> Tensor:
        """Standard normal noise of the shape, dtype and device of `images`.

        Raises:
            ValueError: If there is not one id per image.
        """
        if len(self.ids) != len(images):
            raise ValueError(f"got {len(images)} images but {len(self.ids)} ids to draw their noise from.")
        # Always drawn in float32 on the CPU: a GPU's generator would give another start for the same sample.
        noise = torch.empty(images.shape, dtype=torch.float32)
        for row, sample in enumerate(self.ids):
            noise[row].normal_(generator=self._generator(sample, restart))
        return noise.to(device=images.device, dtype=images.dtype)

    def uniform(self, shape: Sequence[int], *stream: int | str) -> Tensor:
        """Uniform numbers of [0, 1) in float32 on the CPU, shape (len(ids), *shape), for attacks that search at random.

        Args:
            shape: Of the numbers of one sample.
            stream: What they are for; another stream gives other numbers.
        """
        numbers = torch.empty((len(self.ids), *shape), dtype=torch.float32)
        for row, sample in enumerate(self.ids):
            numbers[row].uniform_(generator=self._generator(sample, *stream))
        return numbers

    def take(self, rows: Tensor) -> StartNoise:
        """The noise of some images of the batch; `rows` holds their indices."""
        return replace(self, ids=[self.ids[row] for row in rows.tolist()])

    def _generator(self, sample: int | str, *stream: int | str) -> torch.Generator:
        key = "/".join(map(str, (self.seed, self.step, sample, *stream)))
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
