"""`hf-robust-vision swap`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hf_robust_vision.terminal import at_least, next_steps

from .output import add_json, answer, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("swap", help="a VLM's folder with a hardened CLIP or SigLIP tower in it")
    parser.set_defaults(run=run)
    parser.add_argument("vlm", help='folder or Hub id, or "demo-llava"')
    parser.add_argument("tower", help="the hardened encoder: folder, Hub id, adapter, or open_clip's .pt file")
    parser.add_argument("--output_dir", required=True, help="folder to write")
    parser.add_argument("--revision", help="branch, tag or commit of the VLM")
    parser.add_argument("--towers", nargs="+", help="paths of those to swap; default: all")
    parser.add_argument(
        "--resize",
        choices=("error", "interpolate", "native"),
        default="error",
        help="for a tower of another image size: its positions are resized, or the VLM runs at its size",
    )
    parser.add_argument("--hidden_act", help="activation that the tower was trained with, where it does not say so")
    parser.add_argument("--num_attention_heads", type=at_least(1), help="number of its heads, likewise")
    parser.add_argument("--base", help="model that an adapter was trained on, where it does not say so")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the folder, and say what changed."""
    from hf_robust_vision.data.demo import shipped
    from hf_robust_vision.swap.folder import swap_folder

    names = ("revision", "resize", "hidden_act", "num_attention_heads", "base")
    settings = {name: getattr(args, name) for name in names} | {"towers": args.towers or "all"}
    with working(args):
        report = swap_folder(shipped(args.vlm), shipped(args.tower), args.output_dir, **settings)
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    then = next_steps(["evaluate-vlm", args.output_dir, "--questions", "FILE", "--output_dir", args.output_dir])
    text = f"{report}\nthe whole VLM lies in {args.output_dir}; now measure its answers.\n{then}"
    answer(args, report.to_dict() | {"output_dir": args.output_dir}, text)
    return 0
