"""Speed, memory and time to robustness of a training step, side by side in one run.

    python recipes/research/benchmark.py --output docs/benchmark.md
    python recipes/research/benchmark.py --parts scaling --output docs/benchmark.md    # the other parts keep their tables

Parts, ViT-B/32 at 224 px with random weights and Sim-CLIP's frozen form with PGD-10 unless said otherwise:

- `steps`: (a) the published loop (parameters keep their gradients, sign-PGD by `autograd.grad`), (b) the naive loop
  (`loss.backward()` in the attack), (c) the step of `SimCLIPTrainer`, each in images per second, interleaved, medians.
  The floor is the forward and backward passes that the step needs, timed alone.
- `options`: (c) with each option that makes a step cheaper.
- `forwards`: the anchored form with one forward pass of clean and adversarial images, and with two.
- `scaling`: two processes against one, as a ratio, with two that share nothing as the ceiling.
- `vlm_update`: an update at what a language model reads, `feature: language_tokens` through projector and stock image
  processor, against `patch_tokens` of the same tower; PGD-2, processor time.
- `vlm_memory`: peak memory of an update with and without the language model in memory, VLMs of real dimensions with
  random weights. Only if it is named: it needs 13 GiB of memory and 15 GB of disk.
- `robustness`, on the demo: seconds until validation robust accuracy reaches what the published setting (10 attack
  steps, float32) reaches, for several numbers of attack steps.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from benchmark_page import section, update
from benchmark_scaling import scaling_table
from benchmark_steps import options_table, steps_table
from benchmark_vlm import cost_table, memory_table
from comparison import command_line
from transformers import AutoProcessor

from hf_robust_vision.data.demo import DEMO_EPS, demo_checkpoint, load_demo
from hf_robust_vision.evaluation.results import wilson_interval
from hf_robust_vision.methods.sim_clip import SimCLIPArguments, SimCLIPTrainer
from hf_robust_vision.report.tables import markdown_table
from hf_robust_vision.towers.load import load_encoder


# A part's name on the command line, and that on the page.
PARTS = {
    "steps": "A training step",
    "options": "Options of the step",
    "forwards": "Clean and adversarial images",
    "scaling": "Two processes",
    "vlm_update": "An update through a VLM",
    "vlm_memory": "Memory of a VLM",
    "robustness": "Time to robustness",
}


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
                    return {"seconds": spent, "updates": updates, "robust": robust, "clean": clean}
    raise AssertionError("unreachable")


def robustness_table(seconds: float) -> list[str]:
    """Time to robustness, as Markdown lines."""
    published = harden(10, seconds, every=10, target=None)
    table, target = [], published["robust"]
    for steps, precision in ((10, "fp32 (published)"), *((steps, "fp32") for steps in (5, 3, 2, 1)), (2, "bf16")):
        row = published
        if steps < 10:
            row = harden(steps, 2 * seconds, every=10, target=target, bf16=precision == "bf16")
        low, high = wilson_interval(round(row["robust"] * 256), 256)
        reached = f"{row['seconds']:.0f}" if row["robust"] >= target else f"not in {row['seconds']:.0f}"
        shares = (f"{row['robust']:.3f}", f"{low:.3f} to {high:.3f}", f"{row['clean']:.3f}")
        table.append([steps, precision, reached, row["updates"], *shares])
        print(*table[-1], sep=" | ", file=sys.stderr)
    head = ["attack steps", "precision", "seconds", "updates", "robust", "95 % interval", "clean"]
    return markdown_table(head, table).splitlines()


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "vlm_memory"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--robustness_seconds", type=float, default=120)
    args = parser.parse_args()
    shape = (args.batch_size, args.steps, args.rounds)
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    machine += f"; CPU capability: {torch.backends.cpu.get_cpu_capability()}"
    command = command_line("recipes/research/benchmark.py", sys.argv[1:])
    setting = f"ViT-B/32, 224 px, batch {args.batch_size}, PGD-{args.steps}"
    measures = {
        "steps": (setting, lambda: steps_table(*shape)),
        "options": (setting, lambda: options_table("options", *shape)),
        "forwards": (setting, lambda: options_table("forwards", *shape)),
        "scaling": (f"{setting} each, one thread each", lambda: scaling_table(*shape)),
        "vlm_update": ("Sim-CLIP `frozen`, PGD-2", lambda: cost_table(args.rounds)),
        "vlm_memory": ("one image, PGD-2, float32 tower", memory_table),
        "robustness": (
            "the demo, Sim-CLIP `frozen`, pooled, eps 8/255, PGD-10 on validation",
            lambda: robustness_table(args.robustness_seconds),
        ),
    }
    for part in args.parts:
        about, measure = measures[part]
        text = section(f"{PARTS[part]}: {about}", command, machine, measure())
        print(text)
        if args.output:  # at once: what is measured outlives a later part that fails
            update(args.output, {PARTS[part]: text}, list(PARTS.values()))


if __name__ == "__main__":
    main()
