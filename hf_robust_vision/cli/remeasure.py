"""`hf-robust-vision remeasure`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .output import add_json, answer, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("remeasure", help="classify saved adversarial images again, and compare")
    parser.set_defaults(run=run)
    parser.add_argument("model", help="the model that was measured")
    parser.add_argument("results", help="robustness.json, or its folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that it was measured in")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Compare; 1 where a number does not come out again."""
    import torch

    from hf_robust_vision.evaluation.results import load_results
    from hf_robust_vision.evaluation.tasks.zero_shot import remeasure
    from hf_robust_vision.pipeline.measure import load_model
    from hf_robust_vision.towers.base import weights_sha256
    from hf_robust_vision.towers.text_bank import make_text_bank

    path = Path(args.results)
    measured = load_results(path)
    with working(args):
        encoder, tokenizer = load_model(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    sha256 = weights_sha256(encoder)
    mine = [row for row in measured if row.task == "zero_shot" and row.model_sha256 == sha256]
    results = [row for row in mine if row.images is not None]
    if not results:
        raise ValueError(f"{path} holds no result of {args.model} with saved images; measure with --save_adversarial.")
    told, lines = [], []
    for result in results:
        bank = make_text_bank(encoder, tokenizer, result.class_names, result.templates)
        with working(args):
            again = remeasure(encoder, bank, result, path if path.is_dir() else path.parent)
        about = {
            "dataset": result.dataset,
            "split": result.split,
            "protocol": result.protocol,
            "threat": result.threat,
        }
        told.append(about | asdict(again))
        lines.append(
            f"{result.dataset} ({result.split}), {result.protocol}, {result.threat}: "
            f"{100 * again.robust_accuracy:.1f} % of {again.num_samples} saved, reported {100 * again.reported:.1f} %; "
            f"flags changed: {again.changed or 'none'}, outside the ball: {again.outside or 'none'}"
        )
    agree = not any(each["changed"] or each["outside"] for each in told)
    answer(args, {"agree": agree, "results": told}, "\n".join(lines))
    return 0 if agree else 1
