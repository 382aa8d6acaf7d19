"""Speed, memory and time to robustness of a training step, side by side in one run.

    python recipes/benchmark.py --output docs/benchmark.md

Part 1, ViT-B/32 at 224 px with random weights, Sim-CLIP's frozen form, PGD-10: (a) the published loop (parameters keep
their gradients, sign-PGD by `autograd.grad`), (b) the naive loop (`loss.backward()` in the attack), (c) the step of
`SimCLIPTrainer`, each in images per second, interleaved, medians. The floor is the forward and backward passes that the
step needs, timed alone. Part 2, on the demo: seconds until validation robust accuracy reaches what the published
setting (10 attack steps, float32) reaches, for several numbers of attack steps.
"""

from __future__ import annotations

import argparse
import copy
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoProcessor, CLIPConfig, CLIPModel, CLIPVisionConfig

from hf_robust_vision.data.demo import DEMO_EPS, demo_checkpoint, load_demo
from hf_robust_vision.encoders import CLIPEncoder, as_encoder, attack_mode, freeze_unread, load_encoder
from hf_robust_vision.evaluation.results import wilson_interval
from hf_robust_vision.trainers.sim_clip import SimCLIPArguments, SimCLIPTrainer


EPS, STEP_SIZE = 4 / 255, 1 / 255
Step = Callable[[], object]


def vit_b_32() -> CLIPEncoder:
    """A ViT-B/32 tower at 224 px with random weights; the text tower is shrunk, no step touches it."""
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(vision_config=CLIPVisionConfig(patch_size=32).to_dict(), text_config=text)
    torch.manual_seed(0)
    encoder = as_encoder(CLIPModel(config))
    freeze_unread(encoder)
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


def trainer_step(encoder: CLIPEncoder, images: Tensor, steps: int, bf16: bool) -> Step:
    """One update of `SimCLIPTrainer`: (c)."""
    args = SimCLIPArguments(
        output_dir=tempfile.mkdtemp(),
        form="frozen",
        attack_distance="squared_l2",
        attack_eps=EPS,
        attack_step_size=STEP_SIZE,
        attack_steps=steps,
        bf16=bf16,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10_000,
    )
    trainer = SimCLIPTrainer(model=copy.deepcopy(encoder), args=args)
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


def variants(images: Tensor, steps: int) -> dict[str, Step]:
    """All steps that are timed."""
    encoder = vit_b_32()
    return {
        "(a) published loop, fp32": hand_written(encoder, images, steps, naive=False),
        "(b) naive loop, fp32": hand_written(encoder, images, steps, naive=True),
        "(c) SimCLIPTrainer, fp32": trainer_step(encoder, images, steps, bf16=False),
        "(c) SimCLIPTrainer, bf16": trainer_step(encoder, images, steps, bf16=True),
        "floor: the passes alone, fp32": floor(encoder, images, steps),
    }


def peak_memory(name: str, batch_size: int, steps: int) -> float:
    """Peak memory of one variant in a process of its own, MiB above what it held before the step."""
    command = [sys.executable, __file__, "--memory_of", name, "--batch_size", str(batch_size), "--steps", str(steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def measure_memory(name: str, batch_size: int, steps: int) -> None:
    """The child of `peak_memory`: the second step, since the first one allocates what the optimizer keeps."""
    step = variants(torch.rand(batch_size, 3, 224, 224), steps)[name]
    step()
    if torch.cuda.is_available():
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


def speed_table(batch_size: int, steps: int, rounds: int) -> list[str]:
    """Part 1 as Markdown lines."""
    images = torch.rand(batch_size, 3, 224, 224)
    steps_of = variants(images, steps)
    times: dict[str, list[float]] = {name: [] for name in steps_of}
    for turn in range(rounds + 1):  # the first round warms up
        for name, step in steps_of.items():
            start = time.perf_counter()
            step()
            if turn:
                times[name].append(time.perf_counter() - start)
        print(f"round {turn} of {rounds}", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in times.items()}
    published, naive, *_, base = medians.values()
    lines = [
        "| step | images/s | times (a) | times (b) | time / floor | peak memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in medians.items():
        memory = peak_memory(name, batch_size, steps)
        row = (name, f"{batch_size / seconds:.2f}", f"{published / seconds:.2f}", f"{naive / seconds:.2f}")
        lines.append(f"| {' | '.join(row)} | {seconds / base:.2f} | {memory:.0f} |")
    encoder = vit_b_32()
    share = saved_bytes(encoder, images, frozen=True) / saved_bytes(encoder, images, frozen=False)
    return [*lines, "", f"Bytes saved for the attack's backward pass, (c) to (a): {share:.2f}."]


def harden(
    attack_steps: int, seconds: float, every: int, target: float | None, bf16: bool = False
) -> dict[str, float]:
    """Train on the demo until `target` validation robust accuracy or the time is up; evaluation is not counted."""
    folder = demo_checkpoint()
    encoder = load_encoder(folder)
    args = SimCLIPArguments(
        output_dir=tempfile.mkdtemp(),
        form="frozen",
        attack_eps=DEMO_EPS,
        attack_steps=attack_steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        per_device_train_batch_size=128,
        max_steps=10_000,
        logging_steps=every,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        templates="demo",
        eval_protocol="quick",
        per_device_eval_batch_size=64,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = SimCLIPTrainer(
        model=encoder,
        args=args,
        train_dataset=load_demo("train", encoder.transform),
        eval_dataset=load_demo("validation", encoder.transform),
        processing_class=AutoProcessor.from_pretrained(folder),
    )
    optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=args.learning_rate)
    trainer.current_gradient_accumulation_steps = 1
    model, optimizer, loader = trainer.accelerator.prepare(trainer.model, optimizer, trainer.get_train_dataloader())
    spent, robust, clean, updates = 0.0, 0.0, 0.0, 0
    while spent < seconds:
        for inputs in loader:
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = args.learning_rate * min((updates + 1) / 10, 1)
            optimizer.zero_grad()
            trainer.training_step(model, inputs)
            optimizer.step()
            spent, updates = spent + time.perf_counter() - start, updates + 1
            trainer.state.global_step = updates
            if updates % every == 0 or spent >= seconds:
                metrics = trainer.evaluate()
                robust, clean = metrics["eval_robust_accuracy"], metrics["eval_clean_accuracy"]
                if spent >= seconds or (target is not None and robust >= target):
                    gain = trainer._measured["attack_gain"][-1].item()
                    return {"seconds": spent, "updates": updates, "robust": robust, "clean": clean, "gain": gain}
    raise AssertionError("unreachable")


def robustness_table(seconds: float) -> list[str]:
    """Part 2 as Markdown lines."""
    published = harden(10, seconds, every=10, target=None)
    target = published["robust"]
    lines = [
        "| attack steps | precision | seconds | updates | robust | 95 % interval | clean | attack gain |",
        "|" + "---|" * 8,
    ]

    def add(steps: int, precision: str, row: dict[str, float]) -> None:
        low, high = wilson_interval(round(row["robust"] * 256), 256)
        reached = f"{row['seconds']:.0f}" if row["robust"] >= target else f"not in {row['seconds']:.0f}"
        cells = (steps, precision, reached, row["updates"], f"{row['robust']:.3f}", f"{low:.3f} to {high:.3f}")
        lines.append(f"| {' | '.join(map(str, cells))} | {row['clean']:.3f} | {row['gain']:.3f} |")
        print(lines[-1], file=sys.stderr)

    add(10, "fp32 (published)", published)
    for steps in (5, 3, 2, 1):
        add(steps, "fp32", harden(steps, 2 * seconds, every=10, target=target))
    add(2, "bf16", harden(2, 2 * seconds, every=10, target=target, bf16=True))
    return lines


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--robustness_seconds", type=float, default=120, help="0 leaves part 2 out.")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        measure_memory(args.memory_of, args.batch_size, args.steps)
        return
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    page = ["# Benchmark", "", f"Written by `{shlex.join(['python', *sys.argv])}`.", ""]
    page += [f"{machine}; CPU capability: {torch.backends.cpu.get_cpu_capability()}.", ""]
    page += [f"## A training step: ViT-B/32, 224 px, batch {args.batch_size}, PGD-{args.steps}", ""]
    page += speed_table(args.batch_size, args.steps, args.rounds)
    if args.robustness_seconds:
        page += ["", "## Time to robustness: the demo, Sim-CLIP `frozen`, pooled, eps 8/255, PGD-10 on validation", ""]
        page += robustness_table(args.robustness_seconds)
    text = "\n".join(page) + "\n"
    print(text)
    if args.output:
        args.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
