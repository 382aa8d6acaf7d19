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
- `node`: what eight H100 would take and how many cores feed them; see `benchmark_node.py`.
- `sizes`: memory of an update by the size of the tower; see `benchmark_memory.py`.
- `robustness`: seconds until validation robust accuracy reaches what the published setting (10 attack steps, float32)
  reaches in `--robustness_seconds`, for every setting that saves passes; see `benchmark_robustness.py`. On the demo, or on
  what a file of `compare.py` trains on:

    python recipes/research/benchmark.py --parts robustness --config recipes/research/photos.yaml --data FOLDER
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from pathlib import Path

import torch
from benchmark_memory import memory_by_size
from benchmark_node import node_table
from benchmark_page import section, update
from benchmark_robustness import SETTINGS, Race, config_task, demo_task, robustness_table
from benchmark_scaling import scaling_table
from benchmark_steps import options_table, steps_table
from benchmark_vlm import cost_table, memory_table
from comparison import command_line

from hf_robust_vision.evaluation.results import eps_text


# A part's name on the command line, and that on the page.
PARTS = {
    "steps": "A training step",
    "options": "Options of the step",
    "forwards": "Clean and adversarial images",
    "scaling": "Two processes",
    "vlm_update": "An update through a VLM",
    "vlm_memory": "Memory of a VLM",
    "node": "What a node needs",
    "sizes": "Memory by size",
    "robustness": "Time to robustness",
}
BY_HAND = "What was not built"  # a section of the page that no part writes


def race_of(args: argparse.Namespace) -> Race:
    """What a command line says of the time to robustness."""
    task = config_task(args.config, args.data, args.model) if args.config else demo_task()
    clock = time.process_time if args.processor_time else time.perf_counter
    return Race(
        task,
        args.robustness_seconds,
        args.robustness_batch_size,
        args.learning_rate,
        args.device,
        args.output_dir,
        clock,
    )


def main() -> None:
    """Measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "vlm_memory"])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    race = parser.add_argument_group("time to robustness")
    race.add_argument("--robustness_seconds", type=float, default=600)
    race.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="SETTING")
    race.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first one screens")
    race.add_argument("--config", type=Path, help="YAML file of compare.py; default: the demo")
    race.add_argument("--data", type=Path, help="folder of its data sets")
    race.add_argument("--model", help="the CLIP to start from; default: that of the file")
    race.add_argument("--robustness_batch_size", type=int, default=128)
    race.add_argument("--learning_rate", type=float, default=1e-3)
    race.add_argument("--processor_time", action="store_true", help="where others use the machine, too")
    race.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark-robustness"), help="finished runs")
    args = parser.parse_args()
    shape = (args.batch_size, args.steps, args.rounds, args.device)
    machine = f"{torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    machine += f"; CPU capability: {torch.backends.cpu.get_cpu_capability()}"
    machine += f"; {torch.cuda.get_device_name()}" if args.device == "cuda" else ""
    command = command_line("recipes/research/benchmark.py", sys.argv[1:])
    setting = f"ViT-B/32, 224 px, batch {args.batch_size}, PGD-{args.steps}"
    measures = {
        "steps": (setting, lambda: steps_table(*shape)),
        "options": (setting, lambda: options_table("options", *shape)),
        "forwards": (setting, lambda: options_table("forwards", *shape)),
        "scaling": (f"{setting} each, one thread each", lambda: scaling_table(*shape[:3])),
        "vlm_update": ("Sim-CLIP `frozen`, PGD-2", lambda: cost_table(args.rounds, args.device)),
        "node": ("8 H100, by arithmetic from parts measured on one core", lambda: node_table(args.rounds)),
        "sizes": ("an update in bfloat16, counted and by arithmetic", memory_by_size),
        "vlm_memory": ("one image, PGD-2, float32 tower", memory_table),
    }
    if "robustness" in args.parts:
        runs = race_of(args)
        about = f"{runs.task.about}, Sim-CLIP `frozen`, pooled, eps {eps_text(runs.task.attack_eps, 'linf')}, APGD-10 on validation"
        measures["robustness"] = (about, lambda: robustness_table(runs, args.settings, args.seeds))
    for part in args.parts:
        about, measure = measures[part]
        text = section(f"{PARTS[part]}: {about}", command, machine, measure())
        print(text)
        if args.output:  # at once: what is measured outlives a later part that fails
            update(args.output, {PARTS[part]: text}, [*PARTS.values(), BY_HAND])


if __name__ == "__main__":
    main()
