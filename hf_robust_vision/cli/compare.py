"""`hf-robust-vision compare`."""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path
from typing import Any

from hf_robust_vision.terminal import at_least

from .evaluate import EPS, add_attack, add_data, add_loading, data
from .output import add_json, answer_with_report, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("compare", help="measure CLIP models alike, and show them in one table and page")
    parser.set_defaults(run=run)
    parser.add_argument(
        "models", nargs="+", help='folders or Hub ids of CLIPModels, or "demo-clip"; LABEL=MODEL names one'
    )
    add_data(parser)
    add_attack(parser)
    parser.add_argument("--eps", nargs="+", default=EPS, help=f"radii; default: {' '.join(EPS)}")
    add_loading(parser)
    parser.add_argument("--save_examples", type=at_least(0), default=4, metavar="N", help="images kept to show")
    parser.add_argument("--output_dir", default="outputs/compare", help="results are added to what it holds")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Measure one after the other, print, report."""
    with working(args):
        import torch

        from hf_robust_vision.pipeline.measure import check_model, measure_model, protocol_of

        models = dict(map(labelled, args.models))
        if len(models) < len(args.models):
            raise ValueError(
                "two models have one name; write LABEL=MODEL, as in before=runs/a/clip after=runs/b/clip."
            )
        how, images = protocol_of(vars(args)), data(args)
        for model in models.values():
            check_model(model)  # before hours of measuring the first
        results = []
        for label, model in models.items():
            print(f"{label}:", flush=True)
            settings = {"name": label, "device": args.device, "dtype": getattr(torch, args.dtype)}
            settings |= {"examples": args.save_examples, "progress": sys.stderr.isatty()}
            results += measure_model(model, [images], how, args.output_dir, **settings)
    from hf_robust_vision.report.paired import pairs_of
    from hf_robust_vision.report.tables import models_text

    then = (["push", "BEST_MODEL", "OWNER/NAME", "--collection", "TITLE", "--dry_run"],)
    pairs = cache(lambda: pairs_of(results, args.output_dir))  # only the first process answers, once files are written
    answer_with_report(
        args,
        results,
        args.save_examples,
        lambda rows: "\n\n".join(filter(None, (models_text(rows), pairs().text()))),
        then,
        lambda: pairs().to_dict(),
    )
    return 0


def labelled(text: str) -> tuple[str, str]:
    """Label and model of "LABEL=MODEL", or of a model alone, which its id or the name of its folder labels."""
    label, equals, model = text.partition("=")
    if equals and not Path(text).is_dir():
        return label, model
    return (Path(text).resolve().name if Path(text).is_dir() else text), text
