"""Two processes against one: images per second of the same step, with two that share nothing as the ceiling.

`recipes/research/benchmark.py` calls it; on its own it is one of the processes. All run on the CPU with one thread each.
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

from hf_robust_vision.report.tables import markdown_table


def scaling_table(batch_size: int, steps: int, rounds: int) -> list[str]:
    """Images per second of one process, of two under DDP and of two on their own, and their ratios, as Markdown."""
    worker = [__file__, str(batch_size), str(steps), str(rounds)]
    alone = [sys.executable, *worker, "1"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    one = together([alone])
    ddp = together([[*launcher, *worker, "2"]])
    return table(one, ddp, ceiling=together([alone, alone]))


def table(one: float, ddp: float, ceiling: float) -> list[str]:
    """Two processes against one as a ratio, and that ratio against the one of two that share nothing."""
    speeds = {"one": one, "two, DDP (gloo)": ddp, "two that share nothing: the ceiling": ceiling}
    rows = [[name, f"{speed:.2f}", f"{speed / one:.2f}"] for name, speed in speeds.items()]
    said = f"Two processes against one: {ddp / one:.2f}, of a ceiling of {ceiling / one:.2f}; that is {ddp / ceiling:.0%}."
    lines = markdown_table(["processes", "images/s", "times one process"], rows).splitlines()
    return [*lines, "", said]


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
    for name in ("batch_size", "steps", "rounds", "processes"):
        parser.add_argument(name, type=int)
    args = parser.parse_args()
    torch.set_num_threads(1)
    step = trainer_step(vit_b_32(), torch.rand(args.batch_size, 3, 224, 224), args.steps)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if world != args.processes:
        raise RuntimeError(f"{world} processes train together, not {args.processes}; the ratio would be of nothing.")
    step()
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
