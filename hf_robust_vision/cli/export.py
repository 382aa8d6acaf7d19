"""`hf-robust-vision export`."""

from __future__ import annotations

import argparse
from typing import Any

from hf_robust_vision.terminal import quiet_when_piped


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("export", help="a CLIPModel folder to what older environments read")
    parser.set_defaults(run=run)
    parser.add_argument("model", help='folder or Hub id of a CLIPModel, or "demo-clip"')
    parser.add_argument("--to", choices=("open_clip", "v4"), required=True, help="what is to read the tower")
    parser.add_argument("--output", "--output_dir", required=True, help=".pt file (open_clip) or folder (v4)")


def run(args: argparse.Namespace) -> int:
    """Write the file or folder."""
    from hf_robust_vision.data.demo import shipped
    from hf_robust_vision.swap.convert import export_open_clip, export_v4

    with quiet_when_piped():
        print((export_open_clip if args.to == "open_clip" else export_v4)(shipped(args.model), args.output))
    return 0
