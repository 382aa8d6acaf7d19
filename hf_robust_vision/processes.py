"""The processes of one run: meeting, how many there are, waiting for each other, and parting."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist


if TYPE_CHECKING:
    from transformers import TrainingArguments


def meet() -> None:
    """Join the processes that a launcher started, if one did; `TrainingArguments` does it for training."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(timeout=timedelta(days=1))  # one may be done with its samples hours before the last


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def barrier() -> None:
    """Wait for all processes, where there are several."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def announce(args: TrainingArguments) -> None:
    """Say how many processes train: some launcher settings that name two start one, and say nothing."""
    world, each, accumulated = args.world_size, args.train_batch_size, args.gradient_accumulation_steps
    if args.process_index == 0:
        kind = args.distributed_state.distributed_type.value if args.distributed_state is not None else "NO"
        total = f"{world * each * accumulated} images ({world} x {each} x {accumulated})"
        print(f"processes: {world} ({kind}), an update sees {total}", flush=True)


def part() -> None:
    """End the process group, when all work is done: gloo may abort a process that exits within it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
