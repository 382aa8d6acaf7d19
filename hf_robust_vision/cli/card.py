"""`hf-robust-vision card`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .output import add_json, answer, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser(
        "card", help="write the model card of a measured model, with its numbers and its curve"
    )
    parser.set_defaults(run=run)
    parser.add_argument("folder", help="a model with the results of `evaluate --output_dir` in it")
    parser.add_argument("--name", help="title of the card; default: the folder's")
    parser.add_argument("--base_model", help="Hub id of the original; default: what the model's record says")
    parser.add_argument("--license", help="e.g. apache-2.0; default: what the original's says")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the card that is there, and what you wrote in it"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write it, or say why there can be none."""
    from hf_robust_vision.hub.release import CARD
    from hf_robust_vision.pipeline.card import card_from_records

    folder = Path(args.folder)
    if (folder / CARD).exists() and not args.overwrite:
        raise ValueError(f"{folder / CARD} is there; add --overwrite to replace it, and what you wrote in it.")
    with working(args):
        about = {"base_model": args.base_model, "license": args.license}
        path = card_from_records(folder, args.name or folder.resolve().name, **about)
    answer(args, {"card": str(path)}, f"wrote {path}\nto publish it: hf-robust-vision push {folder} OWNER/NAME")
    return 0
