"""Rows that every process needs and each computes a part of, with the gradient of one process that computes all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_robust_vision.processes import rank_and_world


def my_rows(count: int) -> Tensor:
    """This process's part of `count` rows, as indices: as many for each, with the last row again where they run out."""
    rank, world = rank_and_world()
    each = -(-count // world)
    return torch.arange(rank * each, (rank + 1) * each).clamp_max(count - 1)


def all_rows(part: Tensor, count: int) -> Tensor:
    """The `count` rows of which each process holds those of `my_rows`, in their order, with gradient.

    What comes back to a row is the sum of the gradients of all processes, each of its own loss. Where a launcher then takes
    the mean over the processes of a weight's gradient, as DDP and FSDP2 do, it is that of the mean loss.
    """
    return part if rank_and_world()[1] == 1 else _Gather.apply(part)[:count]


class _Gather(torch.autograd.Function):
    # torch's own (`torch.distributed.nn`) is deprecated, and what is to take its place is no public name yet.

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)  # gloo has no reduce-scatter, and the rows are few
        return total.chunk(dist.get_world_size())[dist.get_rank()]
