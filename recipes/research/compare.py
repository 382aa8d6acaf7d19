"""Every method on the same budget, on classes seen in fine-tuning and on classes never seen in it.

    python recipes/research/compare.py                              # the comparison, on test images
    python recipes/research/compare.py --ablation --docs FOLDER     # what TIMA's parts do, on validation images
    python recipes/research/compare.py --sweep --docs FOLDER        # TIMA's weights, on validation images
    python recipes/research/compare.py --protocol robustvlm --eps 8/255 --images 128    # a stronger attack on the same towers
    python recipes/research/compare.py --benchmark emoji --data outputs/emoji --model outputs/emoji-clip
    python recipes/research/compare.py --config recipes/research/photos.yaml --data FOLDER    # see below

Some classes are held out, of the demo six colour-shape combinations: neither their images nor their names take part in
fine-tuning. All methods share the data, the seeds, the optimiser, the schedule, the updates and the steps of the
attack, and differ in nothing but their two functions. Zero-shot classification is over all names. What is trained or
measured is read back from its folder, so an interrupted command goes on when repeated, and another measurement trains
nothing anew. Nothing else writes `docs/results.md`, and numbers there are replaced by those of the same settings only;
`--docs FOLDER` takes any others.

With `--config` a YAML file says model, data sets, methods and settings: one data set is trained on, others are measured,
and all methods have a budget of passes instead of updates. `--estimate` says what it will cost, `--choose` finds learning
rates and weights on validation photos, `--margins` looks at TIMA's gate and margin, `--cross_check` attacks some hardened
models with an independent AutoAttack; without them test photos are measured at what was chosen. The page is `docs/results-NAME.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks import demo_benchmark, emoji_benchmark
from compare_methods import ABLATION, EMOJI_METHODS, METHODS, ON_REQUEST, RIVALS, SWEEP, Method
from compare_run import Budget, Measuring, Run, hits, perform
from compare_transfer import Comparison, merge_choice
from comparison import TITLES, command_line, docs_folder, paired_interval, write_page
from margins import margins
from pool import perform_all, words
from transfer import read_config
from transfer_estimate import estimate
from transfer_page import write_figure, write_transfer_page

from hf_robust_vision.evaluation.results import RobustnessResult, pretty_eps, source_hash, versions
from hf_robust_vision.files import write_atomically
from hf_robust_vision.processes import run_alone
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.towers.load import load_encoder
from hf_robust_vision.training.config import Radius


CHALLENGERS = ("tima", "tima-no-gate")


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
    parser = make_parser()
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    given = {name for name, value in vars(args).items() if value not in (None, False)}
    if stray := sorted(given & set(OF_BENCHMARKS if args.config else OF_CONFIGS)):
        parser.error(f"--{stray[0]} is {'not for' if args.config else 'for'} a comparison of --config.")
    start = time.time()
    try:
        page = compare_by_config(args) if args.config else compare_on_benchmark(args)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {page} after {time.time() - start:.0f} s")


OF_CONFIGS = ("table", "passes", "attack_eps", "estimate", "choose", "margins", "cross_check")
OF_BENCHMARKS = ("ablation", "sweep", "benchmark", "steps", "batch_size", "learning_rate", "protocol", "eps")


def make_parser() -> argparse.ArgumentParser:
    """What may be typed; a default that depends on the benchmark is None."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--ablation", action="store_true", help="change one part of TIMA at a time")
    table.add_argument("--sweep", action="store_true", help="change one weight of TIMA at a time")
    table.add_argument("--estimate", action="store_true", help="say what the table will cost, and run nothing")
    table.add_argument("--choose", action="store_true", help="choose learning rates and weights on validation photos")
    table.add_argument("--margins", action="store_true", help="look at TIMA's gate and margin on validation photos")
    table.add_argument(
        "--cross_check", action="store_true", help="attack some rows with pyautoattack's AutoAttack, too"
    )
    parser.add_argument("--benchmark", choices=["demo", "emoji"], help="default: the demo")
    parser.add_argument("--config", type=Path, help="YAML file of a comparison, such as recipes/research/photos.yaml")
    parser.add_argument("--table", help="of the YAML file; default: its first one")
    parser.add_argument(
        "--data", type=Path, help="of the emoji: folder of prepare_emoji.py; else that of the data sets"
    )
    parser.add_argument("--model", help="of the emoji: folder of pretrain_emoji_clip.py; else the CLIP to start from")
    parser.add_argument("--methods", type=words(str), help=f"some, separated by commas: {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=words(int), help="default: 0,1,2")
    parser.add_argument("--steps", type=int, help="updates of every method; default: 80")
    parser.add_argument("--passes", type=float, help="budget of every method")
    parser.add_argument("--batch_size", type=int, help="default: 64")
    parser.add_argument("--learning_rate", type=float, help="default: 1e-3")
    parser.add_argument("--attack_eps", type=Radius, help="radius of the attack in fine-tuning, e.g. 4/255")
    parser.add_argument("--images", type=int, help="at most so many of each group or data set; default: 256")
    parser.add_argument("--eval_steps", type=int, help="steps of the measuring attack; default: 20")
    parser.add_argument("--protocol", help="of that attack; default: apgd-ce; another has a section of its own")
    parser.add_argument(
        "--eps", nargs="+", type=lambda text: float(Radius(text)), help="radii; default: the benchmark's"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"), help="one folder a run")
    parser.add_argument(
        "--docs", type=Path, help="where results.md is written; default docs, but not over numbers of other settings"
    )
    return parser


DEFAULTS = {"seeds": [0, 1, 2], "steps": 80, "batch_size": 64, "learning_rate": 1e-3, "images": 256, "eval_steps": 20}
DEFAULTS |= {"protocol": "apgd-ce", "benchmark": "demo"}


def compare_on_benchmark(args: argparse.Namespace) -> Path:
    """The comparison on classes seen and not seen; the page that was written."""
    vars(args).update({name: value for name, value in DEFAULTS.items() if getattr(args, name) is None})
    if (args.benchmark == "emoji") != bool(args.data and args.model):
        raise ValueError("--benchmark emoji needs --data and --model, see docs/emoji.md; the demo brings its own.")
    benchmark = emoji_benchmark(args.data, Path(args.model)) if args.benchmark == "emoji" else demo_benchmark()
    mode, rows = ("ablation", ABLATION) if args.ablation else ("sweep", SWEEP) if args.sweep else ("compare", METHODS)
    if benchmark.name == "emoji":
        mode, rows = ("emoji", EMOJI_METHODS) if mode == "compare" else (f"emoji-{mode}", rows)
    if stray := [word for word in args.methods or () if word not in rows]:
        raise ValueError(f"no method {stray[0]!r}; there are {', '.join(map(repr, rows))}.")
    rows = {word: rows[word] for word in args.methods or [name for name in rows if name not in ON_REQUEST]}
    eps, split = benchmark.eps, "test"
    if args.ablation or args.sweep:  # a choice is made on validation, at the training radius and an unseen one
        eps, split = (benchmark.attack_eps, 2 * benchmark.attack_eps), "validation"
    mode += "" if args.protocol == "apgd-ce" else f"-{args.protocol}"
    if mode not in TITLES:
        raise ValueError(f"the page has no section {mode!r}; it has {', '.join(map(repr, TITLES))}.")
    budget = Budget(args.steps, args.batch_size, args.learning_rate)
    measuring = Measuring(args.protocol, args.eval_steps, args.images, tuple(args.eps or eps), split)
    settings = {"seeds": sorted(args.seeds), "budget": asdict(budget) | asdict(measuring), "methods": list(rows)}
    docs = docs_folder(args.docs, mode, settings)
    source = source_hash()  # of the code as it starts, whatever is edited meanwhile
    runs = [
        Run(method, seed, budget, measuring, benchmark, args.output_dir, source)
        for seed in args.seeds
        for method in rows.values()
        if method.trainer or seed == args.seeds[0]
    ]
    done = perform_all(perform, runs, args.jobs, lambda run: f"{run.method.label}, seed {run.seed}", numbers)
    write_page(report(done, rows, mode), docs)
    return docs / "results.md"


def compare_by_config(args: argparse.Namespace) -> Path:
    """One phase of the comparison that a YAML file describes; the page that was written."""
    config = read_config(args.config)
    changes = {name: getattr(args, name) for name in ("methods", "attack_eps", "passes", "images", "seeds")}
    table = config.table(args.table, changes | {"steps": args.eval_steps}, args.data, args.model)
    said = {str(args.data): "FOLDER", str(args.model): "MODEL", str(args.config): args.config.name}  # of this machine
    command = command_line("recipes/research/compare.py", [said.get(word, word) for word in sys.argv[1:]])
    docs = args.docs or Path("docs")
    file = docs / "results" / f"{config.name}-choice.json"
    choices = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if args.margins:
        write_json(
            docs, f"{config.name}-margins", {"command": command} | margins(table.benchmark, table.choice.images)
        )
        return write_transfer_page(docs, config)
    comparison = Comparison(table, args.output_dir, args.jobs)
    if args.estimate:
        hours = estimate(comparison, choosing=table.choices[0] not in choices)
        print("\n".join(f"{part}: at most about {value:.2f} processor hours" for part, value in hours.items()))
        write_json(docs, f"{table.name}-estimate", {"command": command, "cpu_hours": hours} | table.settings())
    elif args.choose:
        usual = choices.get(table.choices[0])
        if args.docs is None and usual and usual["settings"] != comparison.choice_settings():
            raise ValueError(
                f"{file} holds what other settings chose at {table.choices[0]}; delete it, or add --docs FOLDER."
            )
        for name, chosen in comparison.choose(choices).items():
            choices[name] = merge_choice(choices.get(name), {"commands": [command]} | chosen)
        write_json(docs, file.stem, choices)
    elif args.cross_check:
        write_json(docs, f"{table.name}-cross", {"command": command} | comparison.cross_check(choices))
    else:
        docs_folder(args.docs, table.name, table.settings())
        content = {"command": command} | comparison.measure(choices)
        write_json(docs, table.name, content)
        write_figure(docs, table.name, content)
    return write_transfer_page(docs, config)


def write_json(docs: Path, name: str, content: Mapping[str, Any]) -> None:
    """Keep numbers in `docs/results`."""
    write_atomically(docs / "results" / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
