"""`hf-robust-vision export`."""

from __future__ import annotations

import argparse
from typing import Any

from .output import add_json, answer, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("export", help="a CLIPModel folder to what older environments read")
    parser.set_defaults(run=run)
    parser.add_argument("model", help='folder or Hub id of a CLIPModel, or "demo-clip"')
    parser.add_argument("--to", choices=("open_clip", "v4"), required=True, help="what is to read the tower")
    parser.add_argument("--output", "--output_dir", required=True, help=".pt file (open_clip) or folder (v4)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the file or folder."""
    from hf_robust_vision.data.demo import shipped
    from hf_robust_vision.swap.convert import export_open_clip, export_v4

    with working(args):
        how = str((export_open_clip if args.to == "open_clip" else export_v4)(shipped(args.model), args.output))
    answer(args, {"output": args.output, "load_with": how}, how)
    return 0
