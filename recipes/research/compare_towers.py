"""Where to harden a tower for a VLM: at its class token, or at the patch tokens that the VLM reads.

    python recipes/research/compare_towers.py --docs FOLDER    # Sim-CLIP, pooled against both
    python recipes/research/compare_towers.py --docs FOLDER --methods sim-clip,fare --features pooled,patch_tokens,both

All towers share the demo's images, the updates, the steps of the attack and the seeds, and differ in the features that
the distance is taken at. Each is swapped into the shipped LLaVA, whose colour and shape questions are then attacked
through the whole model. The learning rate of each feature is chosen on validation questions with the first seed; test
questions are asked once of each tower. What is trained or measured already is read back from its folder, so an
interrupted command goes on when repeated. Nothing else writes `docs/results/towers.json` and `towers.md`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from comparison import command_line, docs_folder, paired_interval
from pool import QUIET, digest, perform_all, words
from torch import Tensor
from towers_page import write_towers
from transformers import AutoModelForImageTextToText, AutoProcessor, PrinterCallback
from transformers.utils import logging

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.demo import CLASS_NAMES, DEMO_EPS, demo_checkpoint, load_demo
from hf_robust_vision.data.demo_questions import PROMPT, load_questions
from hf_robust_vision.data.splits import seeded_subset
from hf_robust_vision.data.templates import get_templates
from hf_robust_vision.evaluation.results import (
    RESULTS_FILE,
    RobustnessResult,
    eps_text,
    load_results,
    pretty_eps,
    save_results,
    source_hash,
    versions,
)
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks import VLMProtocol, evaluate_vqa
from hf_robust_vision.evaluation.tasks.zero_shot import evaluate_zero_shot
from hf_robust_vision.files import write_atomically
from hf_robust_vision.methods.fare import FARETrainer
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.processes import run_alone
from hf_robust_vision.swap import swap_vision_encoder
from hf_robust_vision.towers.base import FEATURES, weights_sha256
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.towers.text_bank import make_text_bank


EPS = tuple(step / 255 for step in (4, 8, 16))
METHODS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "sim-clip": ("Sim-CLIP", SimCLIPTrainer, {"form": "frozen"}),
    "fare": ("FARE", FARETrainer, {}),
}


@dataclass(frozen=True)
class Row:
    """One way to harden; the empty one is the original tower."""

    method: str = ""
    feature: str = ""

    @property
    def label(self) -> str:
        """As the page names it."""
        return f"{METHODS[self.method][0]}, `{self.feature}`" if self.method else "original"


@dataclass(frozen=True)
class Training:
    """One hardened tower: a row, a seed, and what all share."""

    row: Row
    seed: int
    learning_rate: float
    steps: int
    batch_size: int

    def arguments(self) -> dict[str, Any]:
        """As arguments of the trainer, all but the seed."""
        return METHODS[self.row.method][2] | {
            "feature": self.row.feature,
            "max_steps": self.steps,
            "per_device_train_batch_size": self.batch_size,
            "learning_rate": self.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": self.steps // 10,
            "weight_decay": 1e-4,
            "max_grad_norm": 1.0,
            "attack_eps": DEMO_EPS,
            "attack_steps": 2,
            "templates": "demo",
            "on_collapse": "record",
        }

    def folder(self, root: Path) -> Path:
        """Named by a hash of every setting and of the CLIP it starts from: a tower is only used again for the same."""
        if not self.row.method:
            return root / "original"
        defaults = {item.name: item.default for item in fields(METHODS[self.row.method][1].args_class)}
        known = {name: value for name, value in defaults.items() if isinstance(value, str | int | float | None)}
        settings = known | self.arguments() | {"clip": _sha256(demo_checkpoint())}
        return root / f"{self.row.method}-{self.row.feature}-{digest(settings)}" / f"seed{self.seed}"


@dataclass(frozen=True)
class Measuring:
    """How towers are measured."""

    split: str
    eps: tuple[float, ...]
    questions: int
    attack_steps: int
    restarts: int
    images: int
    zero_shot_steps: int

    def folder(self, tower: Path) -> Path:
        """Below the tower's, named by a hash of every setting and of both checkpoints."""
        checkpoints = {name: _sha256(demo_checkpoint(name)) for name in ("demo-clip", "demo-llava")}
        return tower / f"{self.split}-{digest(asdict(self) | checkpoints)}"


@cache
def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def perform(training: Training, measuring: Measuring, root: Path) -> list[RobustnessResult]:
    """Harden, swap and measure one tower; what was done before is read back."""
    tower = training.folder(root)
    folder = measuring.folder(tower)
    if (folder / RESULTS_FILE).is_file():
        return load_results(folder)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    record = harden(training, tower)
    results = measure(training, measuring, tower, folder, record)
    save_results(results, folder)
    return results


def harden(training: Training, tower: Path) -> dict[str, Any]:
    """Train and save a tower, and tell how it was made."""
    written = tower / "training.json"
    if not training.row.method:
        return {"method": "none", "seed": None, "cpu_seconds": 0.0}
    if written.is_file():
        return dict(json.loads(written.read_text()))
    _, trainer_class, _ = METHODS[training.row.method]
    encoder = load_encoder(demo_checkpoint())
    settings = training.arguments() | QUIET | {"seed": training.seed}
    trainer = trainer_class(
        encoder,
        trainer_class.args_class(output_dir=str(tower), **settings),
        train_dataset=load_demo("train", encoder.transform),
        processing_class=AutoProcessor.from_pretrained(demo_checkpoint()),
    )
    trainer.remove_callback(PrinterCallback)
    start, source = time.process_time(), source_hash()
    trainer.train()
    record = trainer.training_record()
    record |= {"cpu_seconds": time.process_time() - start, "learning_rate": training.learning_rate, "source": source}
    trainer.save_model(str(tower))
    write_atomically(written, json.dumps(record, indent=1) + "\n")
    return record


def measure(
    training: Training, measuring: Measuring, tower: Path, folder: Path, record: dict[str, Any]
) -> list[RobustnessResult]:
    """Answers of the LLaVA with this tower, and the tower as a zero-shot classifier."""
    name, source = ("after", tower) if training.row.method else ("before", demo_checkpoint())
    processor = AutoProcessor.from_pretrained(demo_checkpoint("demo-llava"))
    vlm = AutoModelForImageTextToText.from_pretrained(demo_checkpoint("demo-llava"), dtype=torch.float32).eval()
    report = swap_vision_encoder(vlm, source, processor=processor)
    report.save(folder)
    found = evaluate_vqa(
        vlm,
        processor,
        load_questions(measuring.split, yes_no=False, limit=measuring.questions),
        VLMProtocol(measuring.eps, steps=measuring.attack_steps, restarts=measuring.restarts, batch_size=50),
        prompt=PROMPT,
        model_name=name,
        dataset="easy-vqa",
        split=measuring.split,
        group="colour/shape",
        samples_dir=folder,
        progress=False,
    )
    encoder = load_encoder(source)
    tokenizer = AutoProcessor.from_pretrained(demo_checkpoint()).tokenizer
    found += evaluate_zero_shot(
        encoder,
        make_text_bank(encoder, tokenizer, CLASS_NAMES, get_templates("demo")),
        seeded_subset(load_demo(measuring.split, encoder.transform), measuring.images, seed=0),
        RobustnessProtocol(get_protocol("apgd-ce", steps=measuring.zero_shot_steps), (DEMO_EPS,), batch_size=64),
        model_name=name,
        samples_dir=folder,
        progress=False,
    )
    for result in found:
        result.training = record | {"drift": report.towers[0].drift}
    return found


def label(training: Training) -> str:
    """Names a tower, for the terminal."""
    return f"{training.row.label}, rate {training.learning_rate:g}, seed {training.seed}"


def numbers(training: Training, results: Sequence[RobustnessResult]) -> str:
    """Answers that are right, clean and at 8/255, for the terminal."""
    answers = at(results, "vqa", DEMO_EPS)
    found = f"{100 * answers.clean_accuracy:.1f} / {100 * answers.robust_accuracy:.1f}"
    return f"answers on {answers.split} {found} % clean / 8/255"


def measured(
    trainings: Sequence[Training], measuring: Measuring, args: argparse.Namespace
) -> dict[Training, list[RobustnessResult]]:
    """All towers, hardened and measured, `args.jobs` at a time."""
    task = partial(perform, measuring=measuring, root=args.output_dir)
    return perform_all(task, trainings, args.jobs, label, numbers)


def at(results: Sequence[RobustnessResult], task: str, eps: float) -> RobustnessResult:
    """The one result of a task and a radius."""
    (found,) = (result for result in results if result.task == task and result.eps == eps)
    return found


def choose(done: Mapping[Training, Sequence[RobustnessResult]]) -> tuple[dict[Row, float], list[dict[str, Any]]]:
    """The learning rate of each row with the most answers that stand at 8/255, and what the choice was made from."""
    best: dict[Row, tuple[float, float]] = {}
    seen = []
    for training in sorted(done, key=lambda training: training.learning_rate):
        found = at(done[training], "vqa", DEMO_EPS)
        seen.append(
            {
                "label": training.row.label,
                "learning_rate": training.learning_rate,
                "clean_accuracy": found.clean_accuracy,
                "robust_accuracy": found.robust_accuracy,
            }
        )
        best[training.row] = max(best.get(training.row, (-1.0, 0.0)), (found.robust_accuracy, training.learning_rate))
    return {row: rate for row, (_, rate) in best.items()}, seen


def flags(result: RobustnessResult, folder: Path, *, clean: bool) -> list[float]:
    """1 for every question that was answered rightly, on the clean or on the attacked image."""
    lost = [json.loads(line)["fooled_by"] for line in (folder / str(result.samples)).read_text().splitlines()]
    return [float(name != "clean" if clean else name is None) for name in lost]


def pairs(done: Mapping[Training, Sequence[RobustnessResult]], measuring: Measuring, root: Path) -> list[Any]:
    """Answers that stand with a token-hardened tower minus those with the pooled one, over questions and seeds."""

    def standing(row: Row, eps: float, clean: bool) -> Tensor:
        mine = sorted((training for training in done if training.row == row), key=lambda training: training.seed)
        folders = [measuring.folder(training.folder(root)) for training in mine]
        results = [at(done[training], "vqa", eps) for training in mine]
        values = [flags(result, folder, clean=clean) for result, folder in zip(results, folders)]
        return torch.tensor(values, dtype=torch.double)

    rows = []
    for one in dict.fromkeys(training.row for training in done):
        other = Row(one.method, "pooled")
        if not one.method or one == other or other not in {training.row for training in done}:
            continue
        for eps, clean in ((EPS[0], True), *((eps, False) for eps in EPS)):
            mean, low, high = paired_interval(standing(one, eps, clean) - standing(other, eps, clean))
            row = {"one": one.label, "other": other.label, "eps": "clean" if clean else eps_text(eps, "linf")}
            rows.append(row | {"difference": mean, "low": low, "high": high})
    return rows


def summary(done: Mapping[Training, Sequence[RobustnessResult]]) -> list[dict[str, Any]]:
    """One entry per row: the values of each seed."""
    entries = []
    for row in dict.fromkeys(training.row for training in done):
        mine = sorted((training for training in done if training.row == row), key=lambda training: training.seed)
        answers = [[at(done[training], "vqa", eps) for eps in EPS] for training in mine]
        zero_shot = [at(done[training], "zero_shot", DEMO_EPS) for training in mine]
        records = [result.training or {} for result in zero_shot]
        entries.append(
            {
                "label": row.label,
                "learning_rate": mine[0].learning_rate,
                "answers_clean": [results[0].clean_accuracy for results in answers],
                "answers": {
                    pretty_eps(column[0]): [result.robust_accuracy for result in column] for column in zip(*answers)
                },
                "zero_shot_clean": [result.clean_accuracy for result in zero_shot],
                "zero_shot": [result.robust_accuracy for result in zero_shot],
                "drift": [record["drift"] for record in records],
                "cpu_seconds": [record["cpu_seconds"] for record in records],
                "source": sorted({record["source"] for record in records if "source" in record}),
                "tower_sha256": [result.model_sha256 for result in zero_shot],
            }
        )
    return entries


def main() -> None:
    """Choose on validation, measure on test, write the page."""
    run_alone("research/compare_towers.py")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=words(str), default=["sim-clip"], help=f"some of {', '.join(METHODS)}")
    parser.add_argument("--features", type=words(str), default=["pooled", "both"], help=f"of {', '.join(FEATURES)}")
    parser.add_argument("--seeds", type=words(int), default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=140, help="updates of every tower")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rates", type=words(float), default=[1e-3, 2e-3], help="to choose from")
    parser.add_argument("--questions", type=int, default=250, help="colour and shape questions, on test")
    parser.add_argument("--choice_questions", type=int, default=150, help="the same, on validation")
    parser.add_argument("--attack_steps", type=int, default=20, help="of PGD on the VLM")
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--images", type=int, default=256, help="for zero-shot accuracy")
    parser.add_argument("--zero_shot_steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="towers at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare-towers"), help="one folder a tower")
    parser.add_argument("--docs", type=Path, help="for results/towers.md; default docs, as in compare.py")
    args = parser.parse_args()
    for kind, given, known in (("method", args.methods, METHODS), ("feature", args.features, FEATURES)):
        if stray := [word for word in given if word not in known]:
            parser.error(f"no {kind} {stray[0]!r}; there are {', '.join(map(repr, known))}.")
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.time()
    rows = [Row(method, feature) for method in args.methods for feature in args.features]
    shared = {"steps": args.steps, "batch_size": args.batch_size}
    test = Measuring("test", EPS, args.questions, args.attack_steps, args.restarts, args.images, args.zero_shot_steps)
    rate = {"learning_rate": args.learning_rates[0]} if len(args.learning_rates) == 1 else {}  # else not chosen yet
    told = {"max_steps": args.steps, "per_device_train_batch_size": args.batch_size} | rate
    settings = {"seeds": args.seeds, "training": told, "measuring": asdict(test)}
    try:
        args.docs = docs_folder(args.docs, "towers", settings | {"methods": [row.label for row in (Row(), *rows)]})
    except ValueError as error:
        parser.error(str(error))
    rates, choice = dict.fromkeys(rows, args.learning_rates[0]), []
    if len(args.learning_rates) > 1:
        tried = [Training(row, args.seeds[0], rate, **shared) for row in rows for rate in args.learning_rates]
        validation = Measuring(
            "validation", (DEMO_EPS,), args.choice_questions, args.attack_steps, 1, args.images, args.zero_shot_steps
        )
        rates, choice = choose(measured(tried, validation, args))
    trainings = [Training(row, seed, rates[row], **shared) for seed in args.seeds for row in rows]
    everything = [Training(Row(), 0, 0.0, 0, 0), *trainings]
    found = measured(everything, test, args)
    done = {training: found[training] for training in everything}  # in the order of the tables
    content = {
        "command": command_line("recipes/research/compare_towers.py", sys.argv[1:]),
        "seeds": args.seeds,
        "training": trainings[0].arguments(),
        "measuring": asdict(test),
        "attacks": at(done[trainings[0]], "vqa", DEMO_EPS).attacks,
        "hashes": {
            "clip": weights_sha256(load_encoder(demo_checkpoint())),
            "llava": weights_sha256(AutoModelForImageTextToText.from_pretrained(demo_checkpoint("demo-llava"))),
        },
        "versions": versions(),
        "rows": summary(done),
        "paired": pairs(done, test, args.output_dir),
        "num_questions": at(done[trainings[0]], "vqa", DEMO_EPS).num_samples,
        "num_images": at(done[trainings[0]], "zero_shot", DEMO_EPS).num_samples,
        "choice": choice,
        "choice_questions": args.choice_questions,
    }
    print(f"wrote {write_towers(content, args.docs)} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
