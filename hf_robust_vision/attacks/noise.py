"""Random numbers that belong to a sample, not to a batch or a device: each is a hash of what it is for and its place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
from torch import Tensor


# A generator with a state would have to be seeded and run for every sample alone, on the CPU: its numbers depend on
# those drawn before, and torch's differ between devices. A number that is a hash of its counter needs no state: the
# images of a batch are drawn in one call where they lie, and whole numbers have the same bits on every device.
# The hash is SplitMix64 (Steele et al. 2014, https://doi.org/10.1145/2660193.2660195), whose n-th output is a mix of
# key + n * GAMMA: shifts, xors and products, which every backend of torch has for int64, and which pass the usual tests
# of randomness. GAMMA is 2^64 over the golden ratio, odd, so that n * GAMMA meets every 64-bit word once and near n lie
# far apart. The shifts and factors are Stafford's (his 13th variant), found by search so that a changed bit of the input
# changes each bit of the output half of the time. Constants are written as torch holds 64 bits, with a sign.
GAMMA = 0x9E3779B97F4A7C15 - 2**64
MIXERS = ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64), (31, 1))
AT_ONCE = 2**20  # numbers that are hashed together: few steps for a GPU, little memory, and a CPU's cache holds them


@dataclass(frozen=True)
class StartNoise:
    """Noise drawn from (seed, step, sample id, restart or stream) and nothing else.

    A sample starts from the same point whatever its batch, rank, device, accumulation or resume, and the global random
    state is neither read nor advanced.

    Args:
        seed: Of the run.
        ids: One id per image of the batch, whole numbers or texts.
        step: Global training step; 0 in an evaluation.
    """

    seed: int
    ids: Sequence[int | str]
    step: int = 0

    def draw(self, images: Tensor, restart: int = 0) -> Tensor:
        """Uniform noise in (-1, 1) of the shape and on the device of `images`, float32 at least, for `Ball.start`.

        Raises:
            ValueError: If there is not one id per image.
        """
        if len(self.ids) != len(images):
            raise ValueError(f"got {len(images)} images but {len(self.ids)} ids to draw their noise from.")
        # Half a step off [-1, 1): symmetric, never at an end, where `erfinv` is infinite; and exact in float32.
        noise = self.uniform(images.shape[1:], restart, device=images.device).mul_(2).sub_(1 - 2**-24)
        return noise.to(torch.promote_types(images.dtype, torch.float32))

    def uniform(self, shape: Sequence[int], *stream: int | str, device: torch.device | str = "cpu") -> Tensor:
        """Uniform numbers of [0, 1) in float32, multiples of 2^-24, one row of `shape` per id.

        Another `stream`, which says what the numbers are for, gives other numbers.
        """
        ids = [_hash(sample) if isinstance(sample, str) else _signed(index(sample)) for sample in self.ids]
        # The ids are mixed before the rest is added, or sample 1 of one seed could be sample 2 of the next one.
        keys = _mix(torch.tensor(ids, dtype=torch.int64)).add_(
            _hash("/".join(map(str, (self.seed, self.step, *stream))))
        )
        count = torch.Size(shape).numel()
        # Two numbers from each word, since float32 holds no more than 24 bits exactly: `>> 8` leaves those, with a sign
        # that adding 0.5 takes away.
        places = torch.arange((count + 1) // 2, device=device).mul_(GAMMA)
        numbers = torch.empty((len(ids), count), device=device)
        rows = max(AT_ONCE // count, 1)
        for part, key in zip(torch.split(numbers, rows), torch.split(_mix(keys).to(device), rows)):
            halves = _mix(key[:, None] + places).view(torch.int32)[:, :count]
            part.copy_(halves >> 8).mul_(2**-24).add_(0.5)
        return numbers.view(len(ids), *shape)

    def take(self, rows: Tensor) -> StartNoise:
        """The noise of some images of the batch; `rows` holds their indices."""
        return replace(self, ids=[self.ids[row] for row in rows.tolist()])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63


def _mix(words: Tensor) -> Tensor:
    """Change each 64-bit word, in place, so that every bit depends on every bit."""
    for shift, factor in MIXERS:
        # torch copies the sign into the bits that a shift sets free; products keep their lowest 64 bits.
        words.bitwise_xor_((words >> shift).bitwise_and_((1 << 64 - shift) - 1)).mul_(factor)
    return words
