"""`hf-robust-vision harden-vlm`: the vision tower of a VLM, in place."""

from __future__ import annotations

import argparse
from typing import Any

from .output import run_recipe


def add(commands: Any) -> None:
    """Its words; all but the model are read by the parser of its recipe."""
    parser = commands.add_parser(
        "harden-vlm",
        help="fine-tune the vision tower inside a VLM, at what its language model reads",
        usage="%(prog)s [MODEL] [--dataset_name IMAGES] [--json] [--NAME VALUE ...]",
        description="Fine-tune the vision tower inside a VLM against adversarial images. The language model is neither run "
        "nor loaded, and stays as it is. Without a model and images it runs the offline demo.",
        add_help=False,
        prefix_chars="\0",  # so that all words, those with dashes among them, reach the recipe's parser
    )
    parser.set_defaults(run=run)
    parser.add_argument("words", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """What `recipes/harden_vlm.py` does."""
    from hf_robust_vision.pipeline.harden_vlm import main

    words = list(args.words)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model_name_or_path")
    return run_recipe(words, lambda rest: main(rest, "hf-robust-vision harden-vlm"))
