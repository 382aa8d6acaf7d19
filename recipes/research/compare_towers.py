"""Where and how to harden a tower for a VLM: at its class token, its patch tokens, or what the language model reads.

    python recipes/research/compare_towers.py --docs FOLDER    # Sim-CLIP, pooled against both
    python recipes/research/compare_towers.py --docs FOLDER --methods sim-clip,fare --features pooled,patch_tokens,both
    python recipes/research/compare_towers.py --name hardening-smolvlm --vlm demo-smolvlm --split validation \
        --features pooled,patch_tokens,language_tokens,language_tokens+attack_eps=16/255+attack_step_size=10/255

All towers share the demo's images, the updates, the steps of the attack and the seeds, and differ in the features that
the distance is taken at; a feature may be followed by other arguments of the trainer, each as +NAME=VALUE. A CLIP tower
is swapped into the VLM, a tower of the VLM's own is hardened in place. The colour and shape questions are then attacked
through the whole model, or through that of `--asked`, another VLM that a CLIP tower fits.
The learning rate of each feature is chosen on validation questions with the first seed; test questions are asked once of
each tower. What is trained or measured already is read back from its folder, so an interrupted command goes on when
repeated. Nothing else writes `docs/results/NAME.json` and `NAME.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from comparison import command_line, docs_folder, paired_interval
from hardened_tower import METHODS, Measuring, Row, Training, folder_of, harden, measure, sees_by_clip
from pool import perform_all, words
from torch import Tensor
from towers_page import write_towers
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from hf_robust_vision.data.demo import DEMO_EPS, demo_checkpoint
from hf_robust_vision.evaluation.results import (
    RESULTS_FILE,
    RobustnessResult,
    eps_text,
    load_results,
    pretty_eps,
    save_results,
    versions,
)
from hf_robust_vision.processes import run_alone
from hf_robust_vision.report.tables import percent
from hf_robust_vision.towers.base import FEATURES, weights_sha256
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.training.config import Radius


EPS = tuple(step / 255 for step in (4, 8, 16))


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


def label(training: Training) -> str:
    """Names a tower, for the terminal."""
    return f"{training.row.label}, rate {training.learning_rate:g}, seed {training.seed}"


def numbers(training: Training, results: Sequence[RobustnessResult]) -> str:
    """Answers that are right, clean and at each radius, for the terminal."""
    answers = [result for result in results if result.task == "vqa"]
    shares = [answers[0].clean_accuracy, *(result.robust_accuracy for result in answers)]
    radii = ["clean", *(pretty_eps(result) for result in answers)]
    return f"answers on {answers[0].split} {' / '.join(percent(x) for x in shares)} {' / '.join(radii)}"


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
        for eps, clean in ((measuring.eps[0], True), *((eps, False) for eps in measuring.eps)):
            mean, low, high = paired_interval(standing(one, eps, clean) - standing(other, eps, clean))
            row = {"one": one.label, "other": other.label, "eps": "clean" if clean else eps_text(eps, "linf")}
            rows.append(row | {"difference": mean, "low": low, "high": high})
    return rows


def summary(done: Mapping[Training, Sequence[RobustnessResult]]) -> list[dict[str, Any]]:
    """One entry per row: the values of each seed."""
    entries = []
    for row in dict.fromkeys(training.row for training in done):
        mine = sorted((training for training in done if training.row == row), key=lambda training: training.seed)
        answers = [[result for result in done[training] if result.task == "vqa"] for training in mine]
        zero_shot = [result for training in mine for result in done[training] if result.task == "zero_shot"]
        records = [results[0].training or {} for results in answers]
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
                "drift": [record["drift"] for record in records if "drift" in record],
                "cpu_seconds": [record["cpu_seconds"] for record in records],
                "source": sorted({record["source"] for record in records if "source" in record}),
                "vlm_sha256": [results[0].model_sha256 for results in answers],
            }
        )
    return entries


def hashes(vlm: str, asked: str) -> dict[str, str]:
    """Of the weights of what is hardened, of the VLM that it is hardened for, and of another one that is asked."""
    found = {"clip": weights_sha256(load_encoder(demo_checkpoint()))} if sees_by_clip(vlm) else {}
    for name, one in {"vlm": vlm, "asked": asked}.items():
        if name == "vlm" or one != vlm:
            found[name] = weights_sha256(AutoModelForImageTextToText.from_pretrained(folder_of(one)))
    return found


def read_row(method: str, text: str, parser: argparse.ArgumentParser) -> Row:
    """Read "feature+name=value+name=value", and refuse what the trainer would, before anything is trained."""
    feature, *words = text.split("+")
    if feature not in FEATURES:
        parser.error(f"no feature {feature!r}; there are {', '.join(map(repr, FEATURES))}.")
    pairs = tuple((name, value) for name, _, value in (word.partition("=") for word in words))
    if not all(value for _, value in pairs):
        parser.error(f"wanted FEATURE+NAME=VALUE, got {text!r}.")
    row = Row(method, feature, pairs)
    try:
        METHODS[method][1].args_class(
            output_dir="unused", **Training(row, 0, 1e-3, 1, 1).arguments() | {"report_to": "none"}
        )
    except ValueError as error:
        parser.error(str(error))
    return row


def main() -> None:
    """Choose on validation, measure on test, write the page."""
    run_alone("research/compare_towers.py")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", type=words(str), default=["sim-clip"], help=f"some of {', '.join(METHODS)}")
    parser.add_argument(
        "--features",
        type=words(str),
        default=["pooled", "both"],
        help=f"of {', '.join(FEATURES)}; FEATURE[+NAME=VALUE...]",
    )
    parser.add_argument("--vlm", default="demo-llava", help="a demo VLM or a folder: whose tower it is or will be")
    parser.add_argument("--asked", help="the VLM that is asked, if it is another")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="of the questions")
    parser.add_argument("--name", default="towers", help="of the files that are written")
    parser.add_argument("--seeds", type=words(int), default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=140, help="updates of every tower")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rates", type=words(float), default=[1e-3, 2e-3], help="to choose from")
    parser.add_argument("--questions", type=int, default=250, help="colour and shape questions, on test")
    parser.add_argument("--choice_questions", type=int, default=150, help="the same, on validation")
    parser.add_argument("--eps", type=words(Radius), default=EPS, help="of the attack on the answers")
    parser.add_argument("--attack_steps", type=int, default=20, help="of PGD on the VLM")
    parser.add_argument("--restarts", type=int, default=1)
    parser.add_argument("--images", type=int, default=256, help="for zero-shot accuracy")
    parser.add_argument("--zero_shot_steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="towers at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare-towers"), help="one folder a tower")
    parser.add_argument("--docs", type=Path, help="for results/towers.md; default docs, as in compare.py")
    args = parser.parse_args()
    if stray := [word for word in args.methods if word not in METHODS]:
        parser.error(f"no method {stray[0]!r}; there are {', '.join(map(repr, METHODS))}.")
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.time()
    rows = [read_row(method, words, parser) for method in args.methods for words in args.features]
    if args.asked and not (sees_by_clip(args.vlm) and sees_by_clip(args.asked)):
        parser.error(f"a tower goes from {args.vlm} to {args.asked} only if both see by a CLIP; leave out --asked.")
    shared = {"steps": args.steps, "batch_size": args.batch_size, "vlm": args.vlm}
    ways = {"attack_steps": args.attack_steps, "images": args.images, "zero_shot_steps": args.zero_shot_steps}
    ways |= {"vlm": args.asked or args.vlm}
    test = Measuring(args.split, tuple(map(float, args.eps)), args.questions, restarts=args.restarts, **ways)
    rate = {"learning_rate": args.learning_rates[0]} if len(args.learning_rates) == 1 else {}  # else not chosen yet
    told = {"max_steps": args.steps, "per_device_train_batch_size": args.batch_size} | rate
    settings = {"seeds": args.seeds, "training": told, "measuring": asdict(test)}
    try:
        labels = [row.label for row in (Row(), *rows)]
        args.docs = docs_folder(args.docs, args.name, settings | {"methods": labels})
    except ValueError as error:
        parser.error(str(error))
    rates, choice = dict.fromkeys(rows, args.learning_rates[0]), []
    if len(args.learning_rates) > 1:
        tried = [Training(row, args.seeds[0], rate, **shared) for row in rows for rate in args.learning_rates]
        validation = Measuring("validation", (DEMO_EPS,), args.choice_questions, restarts=1, **ways)
        rates, choice = choose(measured(tried, validation, args))
    trainings = [Training(row, seed, rates[row], **shared) for seed in args.seeds for row in rows]
    everything = [Training(Row(), 0, 0.0, 0, 0), *trainings]
    found = measured(everything, test, args)
    done = {training: found[training] for training in everything}  # in the order of the tables
    content = {
        "command": command_line("recipes/research/compare_towers.py", sys.argv[1:]),
        "seeds": args.seeds,
        "vlm": args.vlm,
        "in_place": not sees_by_clip(args.vlm),
        "training": replace(trainings[0], row=replace(rows[0], changes=())).arguments(),
        "measuring": asdict(test),
        "attacks": done[trainings[0]][0].attacks,
        "hashes": hashes(args.vlm, test.vlm),
        "versions": versions(),
        "rows": summary(done),
        "paired": pairs(done, test, args.output_dir),
        "num_questions": done[trainings[0]][0].num_samples,
        "num_images": next((r.num_samples for r in done[trainings[0]] if r.task == "zero_shot"), 0),
        "choice": choice,
        "choice_questions": args.choice_questions,
    }
    print(f"wrote {write_towers(content, args.docs, args.name)} after {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
