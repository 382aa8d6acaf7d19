"""The processes of one run: meeting, how many there are, waiting for each other, and parting."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist


PATIENCE = timedelta(days=1)  # one process may be done with its samples hours before the last


if TYPE_CHECKING:
    from transformers import TrainingArguments


def meet(device: str | None = None) -> str | None:
    """Join the processes that a launcher started, if one did; `TrainingArguments` does it for training.

    Returns the device to run on: "cpu" where the launcher says so, else as given, and None for a GPU where there is one.
    """
    check_device(device)
    if device is None and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        device = "cpu"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        on_cpu = device is not None and torch.device(device).type == "cpu"
        if not on_cpu:
            need_a_gpu_each("--device cpu")
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("gloo" if on_cpu else None, timeout=PATIENCE)
    return device


def check_device(device: str | None) -> None:
    """Refuse a device that this machine does not have, by a ValueError."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} can not be used ({reason}); type --device cpu.") from error


def need_a_gpu_each(typed: str) -> None:
    """Refuse more processes on this machine than it has GPUs, if any; what is `typed` puts them all on the CPU."""
    # Not every launcher sets LOCAL_WORLD_SIZE; the last process then finds out.
    local = int(os.environ.get("LOCAL_WORLD_SIZE", int(os.environ.get("LOCAL_RANK", 0)) + 1))
    if torch.cuda.is_available() and local > (gpus := torch.cuda.device_count()):
        raise ValueError(
            f"the launcher started {local} processes on this machine, which has {gpus} GPU{'s' * (gpus > 1)}; start "
            f"one process per GPU (--num_processes {gpus}), or type {typed} to run them on the CPU."
        )


def run_alone(recipe: str) -> None:
    """End a recipe that was started by a launcher and shares nothing out: all processes would write the same files."""
    if (world := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        message = f"error: {recipe} runs in one process, and a launcher started {world}; type python recipes/{recipe}"
        sys.exit(message if os.environ.get("RANK", "0") == "0" else 1)


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(mine: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    world = rank_and_world()[1]
    parts = [mine] * world
    if world > 1:
        dist.all_gather_object(parts, mine)
    return [item for part in parts for item in part]


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        print(f"processes: {world} ({kind}), an update sees {total}\noutput: {args.output_dir}", flush=True)


def part() -> None:
    """End the process group, when all work is done: gloo may abort a process that exits within it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
