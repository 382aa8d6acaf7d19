"""Attack a LLaVA, swap in a hardened vision tower, attack it again.

The demo, offline, with the tower that `recipes/sim_clip.py` left behind:

    python recipes/swap_llava.py --tower outputs/sim-clip-demo

It prints one table (answer accuracy clean and attacked, before and after; feature drift), and saves a stock VLM folder
with `swap_report.json`, `robustness.json` and a picture of one image, its perturbation and the answers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from hf_robust_vision import swap_vision_encoder
from hf_robust_vision.data.demo import DEMO_NAME, demo_checkpoint
from hf_robust_vision.data.demo_questions import PROMPT, load_questions
from hf_robust_vision.evaluation.report import draw_answers
from hf_robust_vision.evaluation.results import RobustnessResult, save_results
from hf_robust_vision.evaluation.vlm import VLMProtocol, attack_example, evaluate_vqa
from hf_robust_vision.trainers.config import Radius


def print_table(results: Sequence[RobustnessResult], drift: float) -> None:
    """Answer accuracy before and after, per kind of question and radius."""
    print(f"\n{'questions':>14}  {'eps':>7}  {'before':>22}  {'after':>22}")
    by_key = {(r.group, r.model, r.eps): r for r in results}
    for group in dict.fromkeys(r.group for r in results):
        radii = [r.eps for r in results if r.group == group and r.model == "before"]
        rows = [("clean", radii[0], "clean"), *((f"{eps * 255:g}/255", eps, "robust") for eps in radii if eps)]
        for name, eps, kind in rows:
            cells = [_cell(by_key[group, model, eps], kind) for model in ("before", "after")]
            print(f"{group:>14}  {name:>7}  {cells[0]:>22}  {cells[1]:>22}")
    print(f"mean cosine of the clean patch tokens, old tower to new: {drift:.3f}\n")


def _cell(result: RobustnessResult, kind: str) -> str:
    low, high = result.ci95[f"{kind}_accuracy"]
    return f"{100 * getattr(result, f'{kind}_accuracy'):.1f} % ({100 * low:.0f} to {100 * high:.0f})"


def measure(vlm: Any, processor: Any, args: argparse.Namespace, model: str) -> list[RobustnessResult]:
    """Colour and shape questions under attack; yes/no questions and a blank image as clean controls."""
    shared: dict[str, Any] = {"prompt": args.prompt, "model_name": model, "dataset": DEMO_NAME, "split": "test"}
    shared["samples_dir"] = args.output_dir
    how = VLMProtocol(
        tuple(map(float, args.eps)), steps=args.steps, restarts=args.restarts, batch_size=args.batch_size
    )
    clean = VLMProtocol((0.0,), steps=0, restarts=1, batch_size=args.batch_size)
    asked = load_questions("test", yes_no=False, limit=args.num_questions)
    yes_no = load_questions("test", yes_no=True, limit=args.num_questions)
    return [
        *evaluate_vqa(vlm, processor, asked, how, group="colour/shape", **shared),
        *evaluate_vqa(vlm, processor, asked, clean, group="  blank image", blank=True, **shared),
        *evaluate_vqa(vlm, processor, yes_no, clean, group="yes/no", **shared),
        *evaluate_vqa(vlm, processor, yes_no, clean, group="yes/no, blank", blank=True, **shared),
    ]


def main() -> None:
    """Measure, swap, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vlm", default=str(demo_checkpoint("demo-llava")), help="Folder or Hub id of the VLM.")
    parser.add_argument("--tower", default="outputs/sim-clip-demo", help="Folder or Hub id of the hardened CLIP.")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/swap-llava"))
    parser.add_argument("--eps", type=Radius, nargs="+", default=[Radius("4/255"), Radius("8/255"), Radius("16/255")])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--num_questions", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=50)
    args = parser.parse_args()
    vlm = AutoModelForImageTextToText.from_pretrained(args.vlm, dtype=torch.float32).eval()
    vlm.to("cuda" if torch.cuda.is_available() else "cpu")
    processor = AutoProcessor.from_pretrained(args.vlm)
    question = load_questions("test", yes_no=False, limit=args.num_questions)[0]
    results = measure(vlm, processor, args, "before")
    example = {"before": attack_example(vlm, processor, question, args.prompt, float(args.eps[0]))}
    try:
        report = swap_vision_encoder(vlm, args.tower, processor=processor)
    except ValueError as error:
        sys.exit(f"error: {error}")
    results += measure(vlm, processor, args, "after")
    example["after"] = attack_example(vlm, processor, question, args.prompt, float(args.eps[0]))
    vlm.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    report.save(args.output_dir)
    save_results(results, args.output_dir)
    draw_answers(example, question.text, args.output_dir / "answers.png")
    print_table(results, report.towers[0].drift)


if __name__ == "__main__":
    main()
