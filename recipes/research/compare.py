"""Every method on the same budget, on classes seen in fine-tuning and on classes never seen in it.

    python recipes/research/compare.py                              # the comparison, on test images
    python recipes/research/compare.py --ablation --docs FOLDER     # what TIMA's parts do, on validation images
    python recipes/research/compare.py --sweep --docs FOLDER        # TIMA's weights, on validation images
    python recipes/research/compare.py --protocol robustvlm --eps 8/255 --images 128    # a stronger attack on the same towers
    python recipes/research/compare.py --benchmark emoji --data outputs/emoji --model outputs/emoji-clip

Some classes are held out, of the demo six colour-shape combinations: neither their images nor their names take part in
fine-tuning. All methods share the data, the seeds, the optimiser, the schedule, the updates and the steps of the
attack, and differ in nothing but their two functions. Zero-shot classification is over all names. What is trained or
measured is read back from its folder, so an interrupted command goes on when repeated, and another measurement trains
nothing anew. Nothing else writes `docs/results.md`, and numbers there are replaced by those of the same settings only;
`--docs FOLDER` takes any others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks import Benchmark, demo_benchmark, emoji_benchmark
from compare_methods import ABLATION, EMOJI_METHODS, METHODS, ON_REQUEST, RIVALS, SWEEP, Method
from comparison import TITLES, command_line, docs_folder, paired_interval, write_page
from pool import QUIET, digest, perform_all, words
from transformers import AutoProcessor, PrinterCallback
from transformers.utils import logging

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.splits import only_classes, seeded_subset
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.results import (
    RESULTS_FILE,
    RobustnessResult,
    load_results,
    pretty_eps,
    save_results,
    source_hash,
    versions,
)
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.files import write_atomically
from hf_robust_vision.processes import run_alone
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.load import Encoder, load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import make_text_bank
from hf_robust_vision.training.config import Radius


CHALLENGERS = ("tima", "tima-no-gate")


@dataclass(frozen=True)
class Budget:
    """The fine-tuning that all methods share; together with a method's options it names the folder of a tower."""

    steps: int
    batch_size: int
    learning_rate: float

    def training(self, benchmark: Benchmark) -> dict[str, Any]:
        """As arguments of a trainer."""
        return {
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.steps // 10,
            "weight_decay": 1e-4,
            "max_grad_norm": 1.0,
            "attack_eps": benchmark.attack_eps,
            "attack_steps": 2,
            "templates": benchmark.templates,
            "on_collapse": "record",
        }


@dataclass(frozen=True)
class Measuring:
    """The measurement that all towers share."""

    protocol: str
    eval_steps: int
    images: int
    eps: tuple[float, ...]
    split: str

    def how(self) -> RobustnessProtocol:
        """One start of each attack."""
        return RobustnessProtocol(
            get_protocol(self.protocol, steps=self.eval_steps, restarts=1), self.eps, batch_size=64
        )


@dataclass(frozen=True)
class Run:
    """One method with one seed on a benchmark."""

    method: Method
    seed: int
    budget: Budget
    measuring: Measuring
    benchmark: Benchmark
    root: Path
    source: str

    @property
    def tower(self) -> Path:
        """Folder named by a hash of every setting, so that a tower is only used again for the same settings."""
        shared: dict[str, Any] = {}
        if self.method.trainer:  # a default that changes makes another run, too
            defaults = {item.name: item.default for item in fields(self.method.trainer.args_class)}
            shared |= {name: value for name, value in defaults.items() if isinstance(value, str | int | float | None)}
            shared |= self.budget.training(self.benchmark) | dict(self.method.options)
        shared["benchmark"] = [self.benchmark.fingerprint, *self.benchmark.class_names]
        shared["prompts"] = get_templates(self.benchmark.templates)
        name = self.method.trainer.__name__ if self.method.trainer else "undefended"
        return self.root / f"{name}-{digest(shared)}" / f"seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Below the tower's, named by a hash of what is measured."""
        return self.tower / f"{self.measuring.split}-{digest(asdict(self.measuring))}"


def perform(run: Run) -> list[RobustnessResult]:
    """Train, save and measure one run, or read back what it left."""
    if (run.folder / RESULTS_FILE).is_file():
        return load_results(run.folder)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = harden(run)
    source = run.tower if run.method.trainer else run.benchmark.checkpoint
    results = measure(load_encoder(source), load_tokenizer(source), run)
    for result in results:
        result.training = record
    save_results(results, run.folder)
    return results


def harden(run: Run) -> dict[str, Any]:
    """Train and save a tower, and tell how it was made."""
    record: dict[str, Any] = {"method": "none", "seed": run.seed, "cpu_seconds": 0.0, "wall_seconds": 0.0}
    if run.method.trainer is None:
        return record | {"source": run.source}
    if (written := run.tower / "training.json").is_file():
        return dict(json.loads(written.read_text()))
    benchmark = run.benchmark
    encoder = load_encoder(benchmark.checkpoint)
    train = benchmark.training_images(encoder.transform)
    settings = run.budget.training(benchmark) | QUIET | dict(run.method.options) | {"seed": run.seed}
    args = run.method.trainer.args_class(output_dir=str(run.tower), **settings)
    processor = AutoProcessor.from_pretrained(benchmark.checkpoint)
    trainer = run.method.trainer(encoder, args, train_dataset=train, processing_class=processor)
    trainer.remove_callback(PrinterCallback)
    wall, cpu = time.time(), time.process_time()
    trainer.train()
    record = trainer.training_record() | {"source": run.source}
    record |= {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.time() - wall}
    trainer.save_model(str(run.tower))
    write_atomically(written, json.dumps(record, indent=1) + "\n")
    return record


def measure(encoder: Encoder, tokenizer: Any, run: Run) -> list[RobustnessResult]:
    """Clean and robust accuracy over all class names, for the images of each group of classes."""
    measuring, benchmark = run.measuring, run.benchmark
    bank = make_text_bank(encoder, tokenizer, benchmark.class_names, get_templates(benchmark.templates))
    results = []
    for group, names in benchmark.groups().items():
        part = only_classes(benchmark.load(measuring.split, encoder.transform), names)
        part = seeded_subset(part, measuring.images, seed=0)
        name = "after" if run.method.trainer else "before"
        found = evaluate_zero_shot(
            encoder, bank, part, measuring.how(), model_name=name, samples_dir=run.folder / group, progress=False
        )
        for result in found:
            result.group, result.samples = group, f"{group}/{result.samples}"
        results += found
    return results


def numbers(run: Run, results: Sequence[RobustnessResult]) -> str:
    """Clean and robust accuracy at the largest radius, for the terminal."""
    at = {row.group: row for row in results if row.eps == max(run.measuring.eps)}
    found = [f"{group} {100 * r.clean_accuracy:.1f} / {100 * r.robust_accuracy:.1f}" for group, r in at.items()]
    seconds = at["seen"].training["cpu_seconds"] if at["seen"].training else 0
    return f"{', '.join(found)} % clean / robust, {seconds:.0f} CPU s"


def summary(done: Mapping[Run, Sequence[RobustnessResult]], methods: Mapping[str, Method]) -> list[dict[str, Any]]:
    """One row per method and group: accuracies of each seed."""
    rows = []
    for name, method in methods.items():
        mine = sorted((run for run in done if run.method is method), key=lambda run: run.seed)
        for group in ("seen", "unseen"):
            per_seed = [[result for result in done[run] if result.group == group] for run in mine]
            first = per_seed[0][0]
            rows.append(
                {
                    "method": name,
                    "label": method.label,
                    "options": dict(method.options),
                    "group": group,
                    "num_samples": first.num_samples,
                    "clean_accuracy": [results[0].clean_accuracy for results in per_seed],
                    "robust_accuracy": {
                        pretty_eps(column[0]): [result.robust_accuracy for result in column]
                        for column in zip(*per_seed, strict=True)
                    },
                    "cpu_seconds": [results[0].training["cpu_seconds"] for results in per_seed if results[0].training],
                    "model_sha256": [results[0].model_sha256 for results in per_seed],
                    "source": sorted({results[0].training["source"] for results in per_seed if results[0].training}),
                }
            )
    return rows


def hits(run: Run, result: RobustnessResult) -> list[float]:
    """1 for every sample that no attack fooled, in the order of the samples."""
    lines = (run.folder / str(result.samples)).read_text().splitlines()
    return [float(json.loads(line)["fooled_by"] is None) for line in lines]


def pairs(done: Mapping[Run, Sequence[RobustnessResult]], one: Method, other: Method) -> list[dict[str, Any]]:
    """The paired comparison of two methods at every radius and group."""
    rows = []
    first = {run.seed: run for run in done if run.method is one}
    second = {run.seed: run for run in done if run.method is other}
    for place, result in enumerate(done[next(iter(first.values()))]):
        both = [[hits(runs[seed], done[runs[seed]][place]) for seed in sorted(first)] for runs in (first, second)]
        mean, low, high = paired_interval(torch.tensor(both[0], dtype=torch.double) - torch.tensor(both[1]))
        row = {"one": one.label, "other": other.label, "group": result.group, "eps": pretty_eps(result)}
        rows.append(row | {"difference": mean, "low": low, "high": high})
    return rows


def report(done: Mapping[Run, Sequence[RobustnessResult]], methods: Mapping[str, Method], mode: str) -> dict[str, Any]:
    """Everything that the page says about one command."""
    some = next(iter(done))
    result, benchmark = done[some][0], some.benchmark
    content = {
        "command": command_line("recipes/research/compare.py", sys.argv[1:]),
        "mode": mode,
        "about": benchmark.about,
        "split": some.measuring.split,
        "budget": asdict(some.budget) | asdict(some.measuring) | {"training": some.budget.training(benchmark)},
        "seeds": sorted({run.seed for run in done if run.method.trainer}),
        "attacks": result.attacks,
        "protocol": result.attacks[0] | {"eps": [pretty_eps(r) for r in done[some] if r.group == "seen"]},
        "unseen": benchmark.unseen,
        "hashes": {"start": weights_sha256(load_encoder(benchmark.checkpoint)), "prompts": result.template_hash},
        "versions": versions(),
        "rows": summary(done, methods),
    }
    if some.measuring.split == "test":
        both = [[methods[name] for name in names if name in methods] for names in (CHALLENGERS, RIVALS)]
        content["paired"] = [row for one, other in product(*both) for row in pairs(done, one, other)]
    elif "tima" in methods:  # what a change of TIMA brings
        others = [method for name, method in methods.items() if name != "tima"]
        content["paired"] = [row for other in others for row in pairs(done, other, methods["tima"])]
    return content


def main() -> None:
    """Perform what is missing, and write the page."""
    run_alone("research/compare.py")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--ablation", action="store_true", help="change one part of TIMA at a time")
    table.add_argument("--sweep", action="store_true", help="change one weight of TIMA at a time")
    parser.add_argument("--benchmark", choices=["demo", "emoji"], default="demo")
    parser.add_argument("--data", type=Path, help="of the emoji: folder of prepare_emoji.py")
    parser.add_argument("--model", type=Path, help="of the emoji: folder of pretrain_emoji_clip.py")
    parser.add_argument("--methods", type=words(str), help=f"some of {', '.join(METHODS)}, separated by commas")
    parser.add_argument("--seeds", type=words(int), default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80, help="updates of every method")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--images", type=int, default=256, help="at most so many images of each group")
    parser.add_argument("--eval_steps", type=int, default=20, help="steps of the measuring attack")
    parser.add_argument("--protocol", default="apgd-ce", help="of that attack; another has a section of its own")
    parser.add_argument(
        "--eps", nargs="+", type=lambda text: float(Radius(text)), help="radii; default: the benchmark's"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"), help="one folder a run")
    parser.add_argument(
        "--docs", type=Path, help="where results.md is written; default docs, but not over numbers of other settings"
    )
    args = parser.parse_args()
    if (args.benchmark == "emoji") != bool(args.data and args.model):
        parser.error("--benchmark emoji needs --data and --model, see docs/emoji.md; the demo brings its own.")
    try:
        benchmark = emoji_benchmark(args.data, args.model) if args.benchmark == "emoji" else demo_benchmark()
    except ValueError as error:
        parser.error(str(error))
    mode, rows = ("ablation", ABLATION) if args.ablation else ("sweep", SWEEP) if args.sweep else ("compare", METHODS)
    if benchmark.name == "emoji":
        mode, rows = ("emoji", EMOJI_METHODS) if mode == "compare" else (f"emoji-{mode}", rows)
    if stray := [word for word in args.methods or () if word not in rows]:
        parser.error(f"no method {stray[0]!r}; there are {', '.join(map(repr, rows))}.")
    rows = {word: rows[word] for word in args.methods or [name for name in rows if name not in ON_REQUEST]}
    os.environ["OMP_NUM_THREADS"] = "1"
    eps, split = benchmark.eps, "test"
    if args.ablation or args.sweep:  # a choice is made on validation, at the training radius and an unseen one
        eps, split = (benchmark.attack_eps, 2 * benchmark.attack_eps), "validation"
    mode += "" if args.protocol == "apgd-ce" else f"-{args.protocol}"
    if mode not in TITLES:
        parser.error(f"the page has no section {mode!r}; it has {', '.join(map(repr, TITLES))}.")
    budget = Budget(args.steps, args.batch_size, args.learning_rate)
    measuring = Measuring(args.protocol, args.eval_steps, args.images, tuple(args.eps or eps), split)
    settings = {"seeds": sorted(args.seeds), "budget": asdict(budget) | asdict(measuring), "methods": list(rows)}
    try:
        args.docs = docs_folder(args.docs, mode, settings)
    except ValueError as error:
        parser.error(str(error))
    start, source = time.time(), source_hash()  # of the code as it starts, whatever is edited meanwhile
    runs = [
        Run(method, seed, budget, measuring, benchmark, args.output_dir, source)
        for seed in args.seeds
        for method in rows.values()
        if method.trainer or seed == args.seeds[0]
    ]
    done = perform_all(perform, runs, args.jobs, lambda run: f"{run.method.label}, seed {run.seed}", numbers)
    write_page(report(done, rows, mode), args.docs)
    print(f"wrote {args.docs / 'results.md'} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
