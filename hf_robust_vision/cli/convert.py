"""`hf-robust-vision convert`."""

from __future__ import annotations

import argparse
from typing import Any

from hf_robust_vision.terminal import at_least, next_steps

from .output import add_json, answer, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("convert", help="open_clip or OpenAI vision weights to a stock CLIPModel folder")
    parser.set_defaults(run=run)
    parser.add_argument("checkpoint", help=".pt or .safetensors file")
    parser.add_argument(
        "--base", required=True, help='folder or Hub id of the CLIPModel that was fine-tuned, or "demo-clip"'
    )
    parser.add_argument("--output_dir", "--output", required=True, help="folder to write")
    parser.add_argument("--hidden_act", help="refuse a base with another activation, e.g. quick_gelu")
    parser.add_argument("--num_attention_heads", type=at_least(1), help="refuse a base with another number of heads")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the folder."""
    from hf_robust_vision.data.demo import shipped
    from hf_robust_vision.swap.convert import convert_checkpoint

    settings = {"hidden_act": args.hidden_act, "num_attention_heads": args.num_attention_heads}
    with working(args):
        folder = str(convert_checkpoint(args.checkpoint, shipped(args.base), args.output_dir, **settings))
    answer(args, {"output_dir": folder}, f"{folder}\n{next_steps(['evaluate', folder, '--dataset', 'IMAGES'])}")
    return 0
