"""What only a GPU can tell: `pytest -m gpu -n0 -rP` prints the card's name. Nothing here runs where there is none."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_robust_vision.attacks import CrossEntropy, LinfBall, StartNoise, apgd, get_protocol, pgd, pgd_last
from hf_robust_vision.evaluation.results import load_samples
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.methods.tima import TIMATrainer
from hf_robust_vision.towers.base import attack_mode
from hf_robust_vision.training.batch import Batch
from tests.training.helpers import SGD, largest_gap, make_trainer, weights


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU, and torch sees none"),
]
ROOT = Path(__file__).parents[2]
DEVICE = "cuda"
BALL = LinfBall(4 / 255)


@pytest.fixture(scope="module", autouse=True)
def _card():
    print(f"card: {torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")


@pytest.fixture
def attacked(encoder, bank):
    """Encoder to its cross-entropy on four images, and the images, on a device."""

    def on(device, dtype):
        model = copy.deepcopy(encoder).to(device, dtype)
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device, dtype)
        labels = torch.tensor([0, 1, 2, 0], device=device)
        return CrossEntropy(bank.classify(lambda images: model(images).image_embeds), labels), images, model

    return on


@pytest.mark.parametrize("attack", [pgd, pgd_last, apgd])
def test_an_attack_is_that_of_the_cpu(attack, attacked):
    """In float64, where no gradient's sign is a matter of rounding."""
    found = []
    for device in ("cpu", DEVICE):
        objective, images, _ = attacked(device, torch.float64)
        found.append(attack(objective, images, BALL, steps=5, noise=StartNoise(0, list(range(4)))).cpu())
    assert (found[0] - found[1]).abs().max() < 1e-9


def test_in_float32_an_attack_is_as_strong(attacked):
    losses = []
    for device in ("cpu", DEVICE):
        objective, images, _ = attacked(device, torch.float32)
        found = pgd(objective, images, BALL, steps=10, noise=StartNoise(0, list(range(4))))
        losses.append(float(objective(found).mean()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_bf16_attacks_are_as_strong(attacked):
    """Judged in float32: a bfloat16 loss could not tell."""
    objective, images, _ = attacked(DEVICE, torch.float32)
    gains = []
    for low in (False, True):
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=low):
            found = pgd_last(objective, images, BALL, steps=10, noise=StartNoise(0, list(range(4))))
        gains.append(float((objective(found) - objective(images)).mean()))
    assert gains[1] > 0.9 * gains[0] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {}, {"form": "anchored", "feature": "both"}, {"kind": TeCoATrainer}, {"kind": TIMATrainer, "variant": "v1"},
        {"attack_token_share": 0.5}, {"carry_starts_mb": 1, "attack_free_step": True}, {"cache_targets_mb": 1},
    ],
    ids=["frozen", "anchored", "tecoa", "tima", "tokens", "carried", "cached"],
)  # fmt: skip
def test_a_training_is_that_of_the_cpu(settings, clip_folder, tmp_path):
    shared = SGD | {"double": True, "max_steps": 6} | settings
    cpu, gpu = (make_trainer(clip_folder, tmp_path, use_cpu=use_cpu, **shared) for use_cpu in (True, False))
    for trainer in (cpu, gpu):
        trainer.train()
    there = {name: value.cpu() for name, value in weights(gpu).items()}
    assert largest_gap(weights(cpu), there) < 1e-8
    passes = [[row["passes"] for row in t.state.log_history if "passes" in row] for t in (cpu, gpu)]
    assert passes[0] == passes[1]


def test_flags_are_those_of_the_cpu(encoder, bank, labelled_by_model, tmp_path):
    rows = []
    for device in ("cpu", DEVICE):
        how = RobustnessProtocol(get_protocol("apgd-ce", steps=5), (1 / 255,), "linf", batch_size=5)
        folder = tmp_path / device
        (result,) = evaluate_zero_shot(
            encoder, bank, labelled_by_model, how, model_name="x", device=device, samples_dir=folder, progress=False
        )
        rows.append(load_samples(folder / result.samples))
    flags = [[(row.id, row.clean, row.fooled_by) for row in each] for each in rows]
    assert flags[0] == flags[1]


def test_no_step_of_an_attack_waits_for_the_host(clip_folder, tmp_path):
    """CUDA's own word: an operation that synchronises is an error between the second step and the last."""
    trainer = make_trainer(clip_folder, tmp_path, use_cpu=False, attack_steps=5, attack_token_share=0.5)
    encoder = trainer.model.to(DEVICE).eval()
    images = torch.rand(4, 3, 32, 32, device=DEVICE)
    ids = torch.arange(4, device=DEVICE)
    objective = trainer.attack_objective(trainer.passes.watch(encoder), Batch(images, ids % 3, ids, trainer.targets))
    calls = []

    def watched(at):
        calls.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(calls) in (2, 3, 4) else "default")
        return objective(at)

    try:
        trainer.attack(watched, Batch(images, ids % 3, ids, trainer.targets))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 5


def test_a_step_of_an_attack_is_a_cuda_graph(attacked):
    """Captured and replayed it is the step: nothing in it asks the host."""
    objective, images, model = attacked(DEVICE, torch.float32)
    with attack_mode(model):
        at = images.clone().requires_grad_(True)

        def step():
            (gradient,) = torch.autograd.grad(objective(at).sum(), at)
            return BALL.project(at + 1 / 255 * BALL.ascend(gradient), images)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                wanted = step().detach()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step().detach()
        graph.replay()
    torch.cuda.synchronize()
    assert (found - wanted).abs().max() < 1e-6


def test_an_attack_holds_less_memory_than_a_pass_that_learns(encoder):
    model = copy.deepcopy(encoder).to(DEVICE)
    images = torch.rand(64, 3, 32, 32, device=DEVICE)

    def held():
        """Bytes that a forward pass leaves for its backward pass."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model(images.clone().requires_grad_(True)).image_embeds.square().sum()
        after = torch.cuda.memory_allocated()
        loss.backward()
        return after - before

    learning = held()
    with attack_mode(model):
        attacking = held()
    assert attacking < 0.9 * learning


def test_the_compiled_step_is_the_step(clip_folder, tmp_path):
    torch._dynamo.reset()
    plain, fast = (
        make_trainer(clip_folder, tmp_path, use_cpu=False, max_steps=5, torch_compile=on, attack_token_share=0.5)
        for on in (False, True)
    )
    for trainer in (plain, fast):
        trainer.train()
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (plain, fast)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_ddp_on_one_gpu_is_a_run_without_it(clip_folder, tmp_path):
    """By torchrun, with NCCL; float64."""
    settings = SGD | {"double": True, "max_steps": 3, "use_cpu": False, "form": "anchored"}
    finals = []
    for name, launcher in (
        ("alone", []),
        ("ddp", ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]),
    ):
        output = tmp_path / name
        output.mkdir()
        said = {"clip": str(clip_folder), "output_dir": str(output), "world_size": 1} | settings
        command = [sys.executable, *launcher, "-m", "tests.training.run_training", json.dumps(said)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        finals.append(torch.load(output / "final-0.pt", weights_only=False)["weights"])
    assert largest_gap(*({key: value.cpu() for key, value in each.items()} for each in finals)) < 1e-10
