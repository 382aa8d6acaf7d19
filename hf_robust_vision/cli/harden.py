"""`hf-robust-vision harden`: the recipes, from anywhere."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from .output import run_recipe


METHODS = {
    "sim-clip": ("SimCLIPTrainer", "unsupervised: clean and adversarial embeddings agree (Sim-CLIP)"),
    "tima": ("TIMATrainer", "with class names: margins between classes and from image to text (TIMA, reconstructed)"),
    "fare": ("FARETrainer", "unsupervised: adversarial embeddings stay where the original's clean ones were (FARE)"),
    "tecoa": ("TeCoATrainer", "with labels: cross-entropy of the zero-shot classifier (TeCoA)"),
    "agft": ("AGFTTrainer", "with class names, no labels: the original's soft answers to the clean images (AGFT)"),
    "pmg-aft": ("PMGAFTTrainer", "with labels: as TeCoA, guided by the original model (PMG-AFT)"),
}


def add(commands: Any) -> None:
    """Its words; those of a method are read by its recipe's parser."""
    methods = "\n".join(f"  {name:<9} {about}" for name, (_, about) in METHODS.items())
    parser = commands.add_parser(
        "harden",
        help="fine-tune a CLIP against adversarial images, measured before and after",
        usage="%(prog)s METHOD [--config FILE] [--model_name_or_path MODEL] [--dataset_name DATA] [--json] [--NAME VALUE ...]",
        description="Fine-tune a CLIP against adversarial images, measured before and after. Without a model, a dataset "
        "and a config it runs the offline demo.",
        epilog=f"methods:\n{methods}\n\nThe arguments of a method: %(prog)s METHOD --help",
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=119),
    )
    parser.set_defaults(run=run)
    parser.add_argument("method", choices=METHODS, metavar="METHOD", help="one of those below")
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """What the recipe of the method does."""
    from hf_robust_vision import pipeline

    method = args.method.replace("-", "_")
    trainer = getattr(import_module(f"hf_robust_vision.methods.{method}"), METHODS[args.method][0])
    return run_recipe(
        args.words, lambda words: pipeline.main(trainer, words, f"hf-robust-vision harden {args.method}")
    )
