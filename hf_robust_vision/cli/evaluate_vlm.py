"""`hf-robust-vision evaluate-vlm`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hf_robust_vision.terminal import at_least

from .evaluate import add_loading, add_named
from .output import add_json, answer_with_report, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("evaluate-vlm", help="answers or captions of a VLM on clean and attacked images")
    parser.set_defaults(run=run)
    parser.add_argument("model", help='folder or Hub id of a VLM, or "demo-llava"')
    parser.add_argument("--questions", help=".csv or .jsonl file: image, question, answer; default: the demo's")
    parser.add_argument("--captions", help=".csv or .jsonl file: image, caption; to measure captions instead")
    parser.add_argument(
        "--prompt", help='with "{}" for the question; default: the question alone, or a wish to describe'
    )
    parser.add_argument("--max_samples", type=at_least(1), help="seeded subset; default: all, of the demo 300")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out images that can not be decoded")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of the perturbation")
    parser.add_argument("--eps", nargs="+", default=["2/255", "4/255"], help="radii; default: 2/255 4/255")
    parser.add_argument("--algorithm", choices=("pgd", "apgd"), default="pgd", help="of the attack")
    parser.add_argument("--steps", type=at_least(1), default=50, help="of each start of the attack")
    parser.add_argument("--restarts", type=at_least(1), default=2, help="random starts of each loss")
    parser.add_argument("--batch_size", type=at_least(1), default=32, help="images attacked at once")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the random starts")
    add_named(parser)
    add_loading(parser)
    parser.add_argument("--save_examples", type=at_least(0), default=4, metavar="N", help="images kept to show")
    parser.add_argument("--output_dir", default="outputs/evaluate-vlm", help="results are added to what it holds")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, print, report."""
    with working(args):
        import torch

        from hf_robust_vision.evaluation.tasks import VLMProtocol
        from hf_robust_vision.pipeline.measure_vlm import Asked, measure_vlm
        from hf_robust_vision.training.config import Radius

        asked = Asked(args.questions, args.captions, args.prompt, args.max_samples, args.skip_corrupt)
        how = VLMProtocol(
            tuple(float(Radius(eps)) for eps in args.eps),
            args.norm,
            args.steps,
            args.restarts,
            **({"objectives": ("nll",)} if args.captions else {}),
            batch_size=args.batch_size,
            seed=args.seed,
            algorithm=args.algorithm,
        )
        results = measure_vlm(
            args.model,
            asked,
            how,
            args.output_dir,
            **{name: getattr(args, name) for name in ("name", "revision", "device")},
            dtype=getattr(torch, args.dtype),
            examples=args.save_examples,
            progress=sys.stderr.isatty(),
        )
    swap = ["swap", args.model, "HARDENED_TOWER", "--output_dir", "DIR"]
    then = (["harden-vlm", args.model, "--dataset", "IMAGES"], swap)
    answer_with_report(args, results, args.save_examples, then=then)
    return 0
