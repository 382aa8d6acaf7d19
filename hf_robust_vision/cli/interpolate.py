"""`hf-robust-vision interpolate`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from hf_robust_vision.terminal import next_steps

from .output import add_json, answer, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser(
        "interpolate", help="a model between an original and its hardened one, by their weights"
    )
    parser.set_defaults(run=run)
    parser.add_argument("original", help='folder or Hub id of what was hardened, or "demo-clip"')
    parser.add_argument("hardened", help="folder or Hub id of what came out, of the same class and shape")
    parser.add_argument("--weight", type=float, required=True, help="share of the hardened model, 0 to 1, e.g. 0.7")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    with working(args):
        from hf_robust_vision.data.demo import shipped
        from hf_robust_vision.towers.interpolate import interpolate
        from hf_robust_vision.towers.records import INTERPOLATE_REPORT

        original, hardened = shipped(args.original), shipped(args.hardened)
        folder = interpolate(original, hardened, args.output_dir, weight=args.weight)
    record = json.loads((folder / INTERPOLATE_REPORT).read_text(encoding="utf-8"))
    verb = "evaluate-vlm" if record["vlm"] else "evaluate"
    text = (
        f"the model at weight {args.weight:g} lies in {folder}, what it was made from in {folder / INTERPOLATE_REPORT}"
    )
    answer(args, record | {"output_dir": args.output_dir}, f"{text}\n{next_steps([verb, args.output_dir])}")
    return 0
