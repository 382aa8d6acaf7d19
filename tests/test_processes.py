"""How the processes of a launcher meet, on machines with fewer GPUs than processes."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from hf_robust_vision.processes import gather, meet, need_a_gpu_each, part, rank_and_world
from hf_robust_vision.training.config import AdversarialTrainingArguments
from tests.training.ranks import CONTEXT, free_port


@pytest.fixture
def one_gpu(monkeypatch):
    """What torch says on a machine with one GPU; none of it is used."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # A torch built for CPUs has no accelerator, whatever `torch.cuda` is made to say.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def join(rank: int, port: int, device: str | None, told) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"ACCELERATE_USE_CPU": "true"} if device is None else {}
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    chosen = meet(device)
    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    told.put((chosen, dist.get_backend(), rank_and_world()[1], int(total), gather(["a", "b"][rank:])))
    part()


@pytest.mark.parametrize("device", ["cpu", None], ids=["device-cpu", "launcher-says-cpu"])
def test_two_processes_meet_on_the_cpu_of_a_machine_with_one_gpu(device):
    told, port = CONTEXT.Queue(), free_port()
    processes = [CONTEXT.Process(target=join, args=(rank, port, device, told), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [told.get(timeout=5) for _ in processes] == [("cpu", "gloo", 2, 3, ["a", "b", "b"])] * 2


@pytest.mark.parametrize("ranks", [{"LOCAL_WORLD_SIZE": "2"}, {"LOCAL_RANK": "1"}], ids=["torchrun", "bare"])
def test_too_few_gpus_are_one_clear_line(ranks, one_gpu, monkeypatch, tmp_path):
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", **ranks}.items():
        monkeypatch.setenv(name, value)
    said = r"started 2 processes on this machine, which has 1 GPU; .*\(--num_processes 1\), or type "
    with pytest.raises(ValueError, match=said + "--device cpu"):
        meet()
    with pytest.raises(ValueError, match=said + "--use_cpu true"):
        AdversarialTrainingArguments(output_dir=str(tmp_path))
    assert not dist.is_initialized()


def test_a_gpu_each_or_none_at_all_is_enough(one_gpu, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    need_a_gpu_each("")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    need_a_gpu_each("")


def test_without_a_launcher_nobody_is_met(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert meet() is None
    assert meet("cpu") == "cpu"
    assert not dist.is_initialized()


@pytest.mark.parametrize("device", ["bogus", "mps:3", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(device):
    """findings-journey 8."""
    with pytest.raises(ValueError, match=f"--device {device} can not be used.*type --device cpu"):
        meet(device)
