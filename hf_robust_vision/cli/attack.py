"""`hf-robust-vision attack`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from hf_robust_vision.terminal import next_steps

from .evaluate import add_attack, add_data, add_loading, add_named, data
from .output import add_json, answer, working


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser(
        "attack", help="adversarial images of a CLIP model as picture files, with their record"
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", help='folder or Hub id of a CLIPModel, or "demo-clip"')
    add_data(parser)
    add_attack(parser)
    parser.add_argument("--eps", default="4/255", help="radius of the perturbation")
    add_named(parser)
    add_loading(parser)
    parser.add_argument("--output_dir", default="outputs/attack", help="where the images and attack.json go")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Attack, write, say how many fell."""
    with working(args):
        import torch

        from hf_robust_vision.pipeline.attack import attack_images
        from hf_robust_vision.pipeline.measure import protocol_of

        record = attack_images(
            args.model,
            data(args),
            protocol_of(vars(args) | {"eps": [args.eps]}),
            args.output_dir,
            **{name: getattr(args, name) for name in ("name", "revision", "device")},
            dtype=getattr(torch, args.dtype),
            progress=sys.stderr.isatty(),
        )
    text = (
        f"{len(record.images)} images in {args.output_dir}/images, the record in {args.output_dir}/attack.json\n"
        f"right on the clean ones {record.clean_accuracy:.1%}, on the attacked ones {record.robust_accuracy:.1%}, on the "
        f"files, whose pixels are rounded, {record.files_accuracy:.1%}\n"
        + next_steps(
            ["evaluate", "OTHER_MODEL", "--dataset", f"{args.output_dir}/images", "--split", "all", "--eps", "0"],
            ["push", args.output_dir, "OWNER/NAME", "--dry_run"],
        )
    )
    answer(args, record.to_dict() | {"output_dir": args.output_dir}, text)
    return 0
