"""Two processes against one: images per second of the same step, with two that share nothing as the ceiling.

`recipes/benchmark.py` calls it; on its own it is one of the processes. All run on the CPU with one thread each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from benchmark_steps import trainer_step, vit_b_32


def scaling_table(batch_size: int, steps: int, rounds: int) -> list[str]:
    """Images per second of one process, of two under DDP and of two on their own, as Markdown lines."""
    worker = [__file__, str(batch_size), str(steps), str(rounds)]
    alone = [sys.executable, *worker]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    speeds = {
        "one process": together([alone]),
        "two processes, DDP (gloo)": together([[*launcher, *worker]]),
        "two processes that share nothing (the ceiling)": together([alone, alone]),
    }
    one = next(iter(speeds.values()))
    rows = [f"| {name} | {speed:.2f} | {speed / one:.2f} |" for name, speed in speeds.items()]
    return ["| processes | images/s | times one process |", "|---|---|---|", *rows]


def together(commands: list[list[str]]) -> float:
    """Images per second of commands that run at the same time, added up."""
    with tempfile.TemporaryDirectory() as meeting:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"BENCHMARK_MEETING": meeting, "BENCHMARK_COMMANDS": str(len(commands))}
        running = [subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) for words in commands]
        outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"a worker of the benchmark failed: {commands}")
    return sum(float(output.split()[-1]) for output in outputs)


def meet() -> None:
    """Wait until every command has come as far as this."""
    place = Path(os.environ["BENCHMARK_MEETING"])
    (place / str(os.getpid())).touch()
    while len(list(place.iterdir())) < int(os.environ["BENCHMARK_COMMANDS"]):
        time.sleep(0.01)


def main() -> None:
    """One process: warm up, meet the others, time the steps, print the images per second of the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("batch_size", "steps", "rounds"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    step = trainer_step(vit_b_32(), torch.rand(args.batch_size, 3, 224, 224), args.steps)
    step()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if rank == 0:
        meet()
    times = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    if rank == 0:
        print(world * args.batch_size / statistics.median(times))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
