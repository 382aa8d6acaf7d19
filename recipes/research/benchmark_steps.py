"""Training steps side by side: the published loop, the naive one, the trainer's, and the trainer's options.

`recipes/research/benchmark.py` calls it; on its own it measures the peak memory of one step in a fresh process.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from hf_robust_vision.methods.sim_clip import SimCLIPArguments, SimCLIPTrainer, siamese_loss
from hf_robust_vision.report.tables import markdown_table
from hf_robust_vision.towers.base import Reads, attack_mode, freeze_unread
from hf_robust_vision.towers.clip import CLIPEncoder
from hf_robust_vision.towers.load import as_encoder
from hf_robust_vision.training.base import Batch


EPS, STEP_SIZE = 4 / 255, 1 / 255
Step = Callable[[], object]


def vit_b_32() -> CLIPEncoder:
    """A ViT-B/32 tower at 224 px with random weights; the text tower is shrunk, no step touches it."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config=CLIPVisionConfig(patch_size=32).to_dict(), text_config=text)
    torch.manual_seed(0)
    encoder = as_encoder(CLIPModel(config))
    freeze_unread(encoder, Reads())
    return encoder


def hand_written(encoder: CLIPEncoder, images: Tensor, steps: int, naive: bool) -> Step:
    """One update as the published loops do it: (a), or (b) with `naive`."""
    encoder = copy.deepcopy(encoder).train()
    frozen = copy.deepcopy(encoder).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        with torch.no_grad():
            target = frozen(images).image_embeds
        encoder.eval()
        delta = torch.empty_like(images).uniform_(-EPS, EPS)
        for _ in range(steps):
            delta.requires_grad_(True)
            loss = (encoder(images + delta).image_embeds - target).square().sum(1).mean()
            if naive:
                loss.backward()
                gradient = delta.grad
            else:
                (gradient,) = torch.autograd.grad(loss, delta)
            moved = (delta.detach() + STEP_SIZE * gradient.sign()).clamp(-EPS, EPS)
            delta = (images + moved).clamp(0, 1) - images
        encoder.train()
        loss = -F.cosine_similarity(encoder(images + delta).image_embeds, target).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


class TwoForwards(SimCLIPTrainer):
    """Sim-CLIP `anchored` with a forward pass for the clean and one for the adversarial images."""

    def robust_loss(self, model: nn.Module, batch: Batch, adversarial: Tensor) -> Tensor:
        """The same loss."""
        clean = model(batch.images, **self.asked)
        loss = siamese_loss(self.distance, clean, model(adversarial, **self.asked))
        return (loss + self.args.anchor_weight * self.distance(clean, batch.original)).mean()


def trainer_step(
    encoder: CLIPEncoder, images: Tensor, steps: int, kind: type[SimCLIPTrainer] = SimCLIPTrainer, **options: Any
) -> Step:
    """One update of `SimCLIPTrainer`."""
    settings = {"form": "frozen", "attack_distance": "squared_l2", "attack_eps": EPS, "attack_step_size": STEP_SIZE}
    args = SimCLIPArguments(
        output_dir=tempfile.mkdtemp(),
        attack_steps=steps,
        report_to="none",
        use_cpu=images.device.type == "cpu",
        logging_steps=10_000,
        probe_every=0,
        **(settings | options),
    )
    trainer = kind(model=copy.deepcopy(encoder), args=args)
    trainer.state.global_step = 1  # step 0 measures drift for the log, which later steps do now and then
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    inputs = {"images": images, "labels": torch.zeros(len(images)).long(), "ids": torch.arange(len(images))}

    def step() -> None:
        optimizer.zero_grad()
        trainer.training_step(model, dict(inputs))
        optimizer.step()

    return step


def floor(encoder: CLIPEncoder, images: Tensor, steps: int) -> Step:
    """Nothing but the passes: the target, the attack's forward and input gradient, the learner's forward and backward."""
    encoder = copy.deepcopy(encoder)

    def step() -> None:
        with torch.no_grad():
            encoder(images)
        with attack_mode(encoder):
            for _ in range(steps):
                leaf = images.clone().requires_grad_(True)
                torch.autograd.grad(encoder(leaf).image_embeds.sum(), leaf)
        encoder(images).image_embeds.sum().backward()
        encoder.zero_grad()

    return step


def saved_bytes(encoder: CLIPEncoder, images: Tensor, frozen: bool) -> int:
    """Bytes that one attack step's forward pass saves for its backward pass, parameters left out."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in encoder.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def forward() -> None:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            leaf = images.clone().requires_grad_(True)
            torch.autograd.grad(encoder(leaf).image_embeds.square().sum(), leaf)

    if frozen:
        with attack_mode(encoder):
            forward()
    else:
        forward()
    return sum(storages.values())


def variants(images: Tensor, steps: int) -> dict[str, dict[str, Callable[[], Step]]]:
    """Name of a table to its rows, each a function that builds the step; the first row is what others are held to."""
    encoder = vit_b_32().to(images.device)
    ours = partial(trainer_step, encoder, images, steps)
    anchored = partial(ours, form="anchored")
    return {
        "steps": {
            "(a) published loop, fp32": partial(hand_written, encoder, images, steps, naive=False),
            "(b) naive loop, fp32": partial(hand_written, encoder, images, steps, naive=True),
            "(c) SimCLIPTrainer, fp32": ours,
            "(c) SimCLIPTrainer, bf16": partial(ours, bf16=True),
            "floor: the passes alone, fp32": partial(floor, encoder, images, steps),
        },
        "options": {
            "(c) SimCLIPTrainer, fp32": ours,
            "matmul_precision: medium": partial(ours, matmul_precision="medium"),
            "torch_compile: true": partial(ours, torch_compile=True),
            "attack_compile: inductor": partial(ours, attack_compile="inductor"),
            "cache_targets_mb: 64, all remembered": partial(ours, cache_targets_mb=64),
            "attack_token_share: 0.5": partial(ours, attack_token_share=0.5),
            "attack_resolution: 160": partial(ours, attack_resolution=160),
            "freeze_blocks: 6": partial(ours, freeze_blocks=6),
            "use_peft: true, lora_r: 8": partial(ours, use_peft=True),
        },
        "forwards": {
            "anchored, clean and adversarial in one forward pass": anchored,
            "anchored, two forward passes": partial(anchored, TwoForwards),
        },
    }


def wall() -> float:
    """Seconds, when a GPU has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleaved(
    builders: dict[str, Callable[[], Step]], rounds: int, clock: Callable[[], float] = wall
) -> dict[str, float]:
    """Median seconds of each step; one of each in turn, so that a busy machine slows all alike."""
    steps = {name: build() for name, build in builders.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):  # the first round warms up
        for name, step in steps.items():
            start = clock()
            step()
            if turn:
                times[name].append(clock() - start)
        print(f"round {turn} of {rounds}", file=sys.stderr)
    return {name: statistics.median(values) for name, values in times.items()}


def steps_table(batch_size: int, steps: int, rounds: int, device: str) -> list[str]:
    """The trainer's step against the loops that it replaces, as Markdown lines."""
    images = torch.rand(batch_size, 3, 224, 224, device=device)
    medians = interleaved(variants(images, steps)["steps"], rounds)
    published, naive, *_, base = medians.values()
    rows = []
    for name, seconds in medians.items():
        times = (batch_size / seconds, published / seconds, naive / seconds, seconds / base)
        memory = peak_memory("steps", name, batch_size, steps, device)
        rows.append([name, *(f"{number:.2f}" for number in times), f"{memory:.0f}"])
    head = ["step", "images/s", "times (a)", "times (b)", "time / floor", "peak memory, MiB"]
    lines = markdown_table(head, rows).splitlines()
    encoder = vit_b_32().to(device)
    share = saved_bytes(encoder, images, frozen=True) / saved_bytes(encoder, images, frozen=False)
    return [*lines, "", f"Bytes saved for the attack's backward pass, (c) to (a): {share:.2f}."]


def options_table(table: str, batch_size: int, steps: int, rounds: int, device: str) -> list[str]:
    """What options change against the first row, each in a turn of its own with it, as Markdown lines."""
    (first, build), *others = variants(torch.rand(batch_size, 3, 224, 224, device=device), steps)[table].items()
    rows = {}
    for name, other in others:
        medians = interleaved({first: build, name: other}, rounds)  # all at once would fill a small machine
        rows.setdefault(first, (medians[first], 1.0))
        rows[name] = (medians[name], medians[first] / medians[name])
    cells = [[name, f"{batch_size / seconds:.2f}", f"{times:.2f}"] for name, (seconds, times) in rows.items()]
    return markdown_table(["step", "images/s", "times the first row"], cells).splitlines()


def peak_memory(table: str, name: str, batch_size: int, steps: int, device: str) -> float:
    """Peak memory of one variant in a process of its own, MiB above what it held before the step."""
    command = [sys.executable, __file__, table, name, str(batch_size), str(steps), device]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main() -> None:
    """The child of `peak_memory`: the second step, since the first one allocates what the optimizer keeps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table")
    parser.add_argument("name")
    parser.add_argument("batch_size", type=int)
    parser.add_argument("steps", type=int)
    parser.add_argument("device")
    args = parser.parse_args()
    images = torch.rand(args.batch_size, 3, 224, 224, device=args.device)
    step = variants(images, args.steps)[args.table][args.name]()
    step()
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        print((torch.cuda.max_memory_allocated() - before) / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts anew
    before = resident("VmRSS")
    step()
    print((resident("VmHWM") - before) / 1024)


def resident(field: str) -> int:
    """A line of /proc/self/status, KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
