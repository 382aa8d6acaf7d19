"""Training runs in processes of their own, all forked from one that has imported everything once."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import socket
from pathlib import Path

import torch


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.run_training"])


def start(clip_folder, output, *, world=1, port=None, **settings) -> list[int]:
    """Exit codes of a run in `world` processes; what rank r said lies in `said-<r>.txt` of `output`."""
    output.mkdir(parents=True, exist_ok=True)
    settings = {"clip": str(clip_folder), "output_dir": str(output), "world_size": world} | settings
    port = free_port() if port is None else port
    daemon = not settings.get("dataloader_num_workers")  # a daemon may have no children
    processes = [
        CONTEXT.Process(target=_be, args=(rank, world, port, settings), daemon=daemon) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    if any(process.exitcode is None for process in processes):
        for process in processes:
            process.kill()
            process.join()
    return [int(process.exitcode) for process in processes]


def said(output, rank=0) -> str:
    return (output / f"said-{rank}.txt").read_text(encoding="utf-8")


def final(output, rank=0):
    return torch.load(output / f"final-{rank}.pt", weights_only=False)["weights"]


PORTS = itertools.count()


def free_port() -> int:
    """A port that nobody listens at: of another range in each test process, so that no two are given the same."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 20_000 + 1000 * (worker % 10) + next(PORTS) % 1000
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port


def _be(rank: int, world: int, port: int, settings: dict) -> None:
    """What torchrun does for a rank."""
    file = os.open(Path(settings["output_dir"]) / f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from tests.training.run_training import main

    main(settings)
