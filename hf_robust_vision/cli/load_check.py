"""`hf-robust-vision load-check`."""

from __future__ import annotations

import argparse
from typing import Any

from hf_robust_vision.terminal import at_least

from .output import add_json, answer, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("load-check", help="whether a model can be read whole, and attacked to its pixels")
    parser.set_defaults(run=run)
    parser.add_argument("model", help='folder or Hub id of a CLIP, SigLIP or VLM, or "demo-clip"')
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--resolution", type=at_least(1), help="side of square images, for a VLM of free image size")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Load, look, say; what can not be used ends in an error."""
    from hf_robust_vision.data.demo import shipped
    from hf_robust_vision.towers.check import check_load

    with working(args):
        found = check_load(shipped(args.model), revision=args.revision, resolution=args.resolution)
    answer(args, found.to_dict(), str(found))
    return 0
