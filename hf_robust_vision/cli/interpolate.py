"""`hf-robust-vision interpolate`."""

from __future__ import annotations

import argparse
from typing import Any


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


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    from hf_robust_vision.data.demo import shipped
    from hf_robust_vision.towers.interpolate import interpolate

    print(interpolate(shipped(args.original), shipped(args.hardened), args.output_dir, weight=args.weight))
    return 0
