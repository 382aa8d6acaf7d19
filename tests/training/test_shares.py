"""Rows of which each process computes a part: their values, and the gradient of the mean loss."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from hf_robust_vision.processes import meet, part
from hf_robust_vision.training.shares import all_rows, my_rows
from tests.training.ranks import CONTEXT, free_port


COUNT, WIDTH = 5, 3


def loss_of(rows: torch.Tensor, rank: int) -> torch.Tensor:
    """Another one on each process, in which every row meets every other."""
    weights = torch.arange(COUNT, dtype=rows.dtype) + 1 + rank
    return (rows @ rows.T * weights).sum() + (rank + 1) * rows.pow(3).sum()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    sizes = (COUNT, 4), (4, WIDTH)
    return tuple(torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)


def share(rank: int, port: int, told) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    meet("cpu")
    given, weight = inputs()
    weight.requires_grad_(True)
    rows = all_rows(given[my_rows(COUNT)] @ weight, COUNT)
    with torch.no_grad():
        silent = all_rows(given[my_rows(COUNT)] @ weight, COUNT)
    loss_of(rows, rank).backward()
    dist.all_reduce(weight.grad)
    few = all_rows(my_rows(1).double(), 1)
    told.put(
        (rank, my_rows(COUNT).tolist(), few.tolist(), *(each.tolist() for each in (rows, silent, weight.grad / 2)))
    )
    part()


def test_two_processes_have_the_rows_and_the_gradient_of_one():
    told, port = CONTEXT.Queue(), free_port()
    processes = [CONTEXT.Process(target=share, args=(rank, port, told), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    heard = sorted(told.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    given, weight = inputs()
    weight.requires_grad_(True)
    rows = given @ weight
    (sum(loss_of(rows, rank) for rank in range(2)) / 2).backward()
    assert [each[1] for each in heard] == [[0, 1, 2], [3, 4, 4]], "as many each, and the last one again"
    for _, _, few, gathered, silent, gradient in heard:
        assert few == [0.0]
        assert (torch.tensor(gathered, dtype=torch.float64) - rows).abs().max() < 1e-12
        assert gathered == silent
        assert (torch.tensor(gradient, dtype=torch.float64) - weight.grad).abs().max() < 1e-12


def test_one_process_has_all():
    part = torch.rand(COUNT, WIDTH, requires_grad=True)
    assert all_rows(part, COUNT) is part
    assert my_rows(COUNT).tolist() == list(range(COUNT))
