# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-robust-vision[demo]"]
#
# [tool.uv.sources]
# hf-robust-vision = { path = "..", editable = true }
# ///
"""Attack a LLaVA, swap in a hardened vision tower, attack it again.

The demo, offline: the CLIP hardened at what the LLaVA's language model reads, then the swap:

    accelerate launch recipes/sim_clip.py --config sim_clip_demo_llava
    python recipes/swap_llava.py --eps 8/255 16/255

It prints one table (answer accuracy clean and attacked, before and after; feature drift), and saves a stock VLM folder
with `swap_report.json`, `robustness.json` and a picture of one image, its perturbation and the answers: of the first
question that the swap repairs, if there is one.

`--target blue` also measures how often an attacker makes the model say a chosen text, before and after.
`--check_attack` measures nothing of this: it shows that the attack is a real one, by its accuracy over steps and eps on
the first `--num_questions` questions (50 are enough), and stops.
`--sanity` checks the attacked numbers for gradient masking, before and after; the answers go into `robustness.json`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_robust_vision import swap_vision_encoder
from hf_robust_vision.data.demo import DEMO_NAME, demo_checkpoint
from hf_robust_vision.data.demo_questions import PROMPT, load_questions
from hf_robust_vision.evaluation.results import RobustnessResult, eps_text, load_samples, save_results
from hf_robust_vision.evaluation.tasks import VQA, VLMProtocol, attack_example, evaluate_targeted, evaluate_vqa
from hf_robust_vision.evaluation.tasks.vqa import Question
from hf_robust_vision.processes import run_alone
from hf_robust_vision.report.pictures import draw_answers
from hf_robust_vision.report.tables import percent, point, text_table
from hf_robust_vision.sanity.check import add_sanity, sanity_text
from hf_robust_vision.swap.source import load_source
from hf_robust_vision.terminal import Parser, at_least, user_errors
from hf_robust_vision.training.config import Radius


CHECK_STEPS = (1, 5, 10, 50)
SANITY = {"samples": 40, "queries": 200}
CHECK_EPS = (1, 2, 4, 8, 16, 32)


def print_table(results: Sequence[RobustnessResult], drift: float | None) -> None:
    """Answer accuracy before and after, per kind of question and radius."""
    by_key = {(r.group, r.model, r.eps): r for r in results if r.attack_success is None}
    rows = []
    for group in dict.fromkeys(group for group, _, _ in by_key):
        radii = [eps for one, model, eps in by_key if one == group and model == "before"]
        for name, eps, kind in [
            ("clean", radii[0], "clean"),
            *((eps_text(e, "linf"), e, "robust") for e in radii if e),
        ]:
            cells = [point(by_key[group, model, eps], kind) for model in ("before", "after")]
            rows.append([group, name, *cells])
    print(f"\n{text_table(['questions', 'eps', 'before', 'after'], rows)}")
    if drift is not None:
        print(f"mean cosine of the clean patch tokens, old tower to new: {drift:.3f}\n")


def print_targeted(results: Sequence[RobustnessResult], target: str) -> None:
    """How often the target is said, before and after."""
    rates = {(r.eps, r.model): r.attack_success for r in results if r.attack_success is not None}
    radii = sorted({eps for eps, _ in rates})
    rows = [
        [name, *(percent(rates[eps, model][kind]) for model in ("before", "after"))]
        for name, eps, kind in [("clean", radii[0], "clean"), *((eps_text(e, "linf"), e, "attacked") for e in radii)]
    ]
    print(f"{text_table([f'{target!r} is said', 'before', 'after'], rows)}\n")


def questions(args: argparse.Namespace, *, yes_no: bool = False) -> list[Any]:
    """The demo's questions, each with the fields of a `Question`."""
    return list(load_questions("test", yes_no=yes_no, limit=args.num_questions))


def measure(vlm: Any, processor: Any, args: argparse.Namespace, model: str) -> list[RobustnessResult]:
    """Colour and shape questions under attack; yes/no questions and a blank image as clean controls."""
    shared: dict[str, Any] = {"prompt": args.prompt, "model_name": model, "dataset": DEMO_NAME, "split": "test"}
    shared["samples_dir"] = args.output_dir
    how = VLMProtocol(
        tuple(map(float, args.eps)), steps=args.steps, restarts=args.restarts, batch_size=args.batch_size
    )
    clean = VLMProtocol((0.0,), steps=1, restarts=1, batch_size=args.batch_size)
    asked, yes_no = questions(args), questions(args, yes_no=True)
    targeted = {"group": "targeted", "max_new_tokens": 8, **shared}
    attacked = evaluate_vqa(vlm, processor, asked, how, group="colour/shape", **shared)
    if args.sanity:
        task = VQA(vlm, processor, asked, args.prompt, DEMO_NAME, "test")
        add_sanity(attacked, {model: task}, how.robustness(), **SANITY)
    return [
        *attacked,
        *evaluate_vqa(vlm, processor, asked, clean, group="  blank image", blank=True, **shared),
        *evaluate_vqa(vlm, processor, yes_no, clean, group="yes/no", **shared),
        *evaluate_vqa(vlm, processor, yes_no, clean, group="yes/no, blank", blank=True, **shared),
        *(evaluate_targeted(vlm, processor, asked, args.target, how, **targeted) if args.target else ()),
    ]


def check_attack(vlm: Any, processor: Any, args: argparse.Namespace) -> list[RobustnessResult]:
    """Accuracy under one start of PGD on the loss alone, each cell attacked anew: it must fall along rows and columns."""
    asked = questions(args)
    folder = args.output_dir / "check_attack"
    results = []
    print("\naccuracy, %   eps" + "".join(f"{eps:>6}" for eps in CHECK_EPS) + "   /255")
    for steps in CHECK_STEPS:
        print(f"{steps:>3} step{'s' if steps > 1 else ' '}        ", end="", flush=True)
        for eps in CHECK_EPS:
            how = VLMProtocol((eps / 255,), "linf", steps, 1, ("nll",), args.batch_size)
            about: dict[str, Any] = {"model_name": "before", "dataset": DEMO_NAME, "split": "test", "progress": False}
            about |= {"prompt": args.prompt, "group": "colour/shape", "samples_dir": folder}
            results += evaluate_vqa(vlm, processor, asked, how, **about)
            print(f"{100 * results[-1].robust_accuracy:>6.0f}", end="", flush=True)
        print()
    print(f"clean {100 * results[0].clean_accuracy:.0f} % of {len(asked)} questions\n")
    save_results(results, folder)
    return results


def repaired(results: Sequence[RobustnessResult], args: argparse.Namespace) -> Question:
    """The first question that falls before the swap and stands after it, for the picture; else the first one."""
    stood = {}
    for result in results:
        if result.group == "colour/shape" and result.eps == float(args.eps[0]):
            records = load_samples(args.output_dir / str(result.samples))
            stood[result.model] = {record.id for record in records if record.robust_hit}
    asked = questions(args)
    better = stood["after"] - stood["before"]
    return next((question for question in asked if question.id in better), asked[0])


def check_inputs(tower: str) -> None:
    """Find out now, and not after the first measurement, what the second one and the picture need.

    Raises:
        SystemExit: If the tower can not be read, or matplotlib is not installed.
    """
    try:
        load_source(tower)
    except (ValueError, OSError) as error:
        sys.exit(f"error: --tower {tower}: {error}")
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit('error: the picture of the answers needs matplotlib: pip install "hf-robust-vision[report]"')


def main() -> None:
    """Measure, swap, measure, save."""
    run_alone("swap_llava.py")
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default=str(demo_checkpoint("demo-llava")), help="Folder or Hub id of the VLM.")
    parser.add_argument(
        "--tower", default="outputs/sim-clip-demo-llava", help="Folder or Hub id of the hardened CLIP."
    )
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/swap-llava"))
    parser.add_argument("--eps", type=Radius, nargs="+", default=[Radius("8/255")])
    parser.add_argument("--steps", type=at_least(1), default=50)
    parser.add_argument("--restarts", type=at_least(1), default=2)
    parser.add_argument("--num_questions", type=at_least(1), default=300)
    parser.add_argument("--batch_size", type=at_least(1), default=50)
    parser.add_argument("--target", help="Also attack towards this text.")
    parser.add_argument("--sanity", action="store_true", help="Check the attacked numbers for gradient masking.")
    parser.add_argument("--check_attack", action="store_true", help="Print accuracy over steps and eps, and stop.")
    args = parser.parse_args()
    with user_errors():
        run(args)


def run(args: argparse.Namespace) -> None:
    """What the words ask for."""
    if not args.check_attack:
        check_inputs(args.tower)
    vlm = AutoModelForImageTextToText.from_pretrained(args.vlm, dtype=torch.float32).eval()
    vlm.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(args.vlm)
    if args.check_attack:
        check_attack(vlm, processor, args)
        return
    results = measure(vlm, processor, args, "before")
    report = swap_vision_encoder(vlm, args.tower, processor=processor)
    print(*report.warnings, sep="\n", file=sys.stderr)
    results += measure(vlm, processor, args, "after")
    vlm.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    report.save(args.output_dir)
    save_results(results, args.output_dir)
    question = repaired(results, args)
    shown = VLMProtocol((float(args.eps[0]),), steps=args.steps, restarts=args.restarts)
    after = attack_example(vlm, processor, question, args.prompt, shown)
    report.restore()
    before = attack_example(vlm, processor, question, args.prompt, shown)
    draw_answers({"before": before, "after": after}, question.text, args.output_dir / "answers.png")
    print_table(results, report.towers[0].drift)
    if args.sanity:
        print(sanity_text(results))
    if args.target:
        print_targeted(results, args.target)


if __name__ == "__main__":
    main()
