"""`hf-robust-vision`: harden, convert, export and publish from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any


METHODS = {
    "sim-clip": ("hf_robust_vision.trainers.sim_clip", "SimCLIPTrainer"),
    "tima": ("hf_robust_vision.trainers.tima", "TIMATrainer"),
    "fare": ("hf_robust_vision.trainers.fare", "FARETrainer"),
    "tecoa": ("hf_robust_vision.trainers.tecoa", "TeCoATrainer"),
    "pmg-aft": ("hf_robust_vision.trainers.pmg_aft", "PMGAFTTrainer"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; bad input is one line on the error stream and exit status 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] == ["harden"]:
            return _harden(words[1:])
        return _other(words)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _harden(words: list[str]) -> int:
    if not words or words[0] not in METHODS:
        raise ValueError(f"usage: hf-robust-vision harden {{{','.join(METHODS)}}} [arguments of the recipe]")
    from importlib import import_module

    from hf_robust_vision.pipeline import USER_ERRORS, parse, run

    module, name = METHODS[words[0]]
    trainer_class = getattr(import_module(module), name)
    try:
        run(trainer_class, *parse(trainer_class, words[1:]))
    except USER_ERRORS as error:
        raise ValueError(str(error)) from error
    return 0


def _other(words: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="hf-robust-vision", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("harden", help="fine-tune a CLIP against adversarial images, measured before and after")
    convert = commands.add_parser("convert", help="open_clip or OpenAI vision weights to a stock CLIPModel folder")
    convert.add_argument("checkpoint", help=".pt or .safetensors file")
    convert.add_argument("--base", required=True, help="folder or Hub id of the CLIPModel that was fine-tuned")
    convert.add_argument("--output", required=True, help="folder to write")
    convert.add_argument("--hidden_act", help="refuse a base with another activation, e.g. quick_gelu")
    convert.add_argument("--num_attention_heads", type=int, help="refuse a base with another number of heads")
    export = commands.add_parser("export", help="a CLIPModel folder to what older environments read")
    export.add_argument("model", help="folder or Hub id of a CLIPModel")
    export.add_argument("--to", choices=("open_clip", "v4"), required=True)
    export.add_argument("--output", required=True, help=".pt file (open_clip) or folder (v4)")
    _add_push(commands)
    args = parser.parse_args(words)
    if args.command == "push":
        return _push(args)
    from hf_robust_vision.vlm.convert import convert_checkpoint, export_open_clip, export_v4

    if args.command == "convert":
        settings = {"hidden_act": args.hidden_act, "num_attention_heads": args.num_attention_heads}
        print(convert_checkpoint(args.checkpoint, args.base, args.output, **settings))
    elif args.command == "export":
        print((export_open_clip if args.to == "open_clip" else export_v4)(args.model, args.output))
    return 0


def _add_push(commands: Any) -> None:
    push = commands.add_parser("push", help="publish a measured model folder on the Hub, with its card and numbers")
    push.add_argument("folder", help="what a recipe wrote")
    push.add_argument("repo_id", help="owner/name; the token is that of `hf auth login` or HF_TOKEN")
    push.add_argument("--what", choices=("model", "tower", "adapter"), help="default: what the folder holds")
    push.add_argument("--private", action="store_const", const=True, help="create a private repository")
    push.add_argument("--revision", help="branch")
    push.add_argument("--commit_message")
    push.add_argument("--create_pr", action="store_true", help="open a pull request")
    push.add_argument("--base_model", help="Hub id of the original")
    push.add_argument("--license", help="for the card, e.g. apache-2.0")
    push.add_argument("--dry_run", action="store_true", help="check everything, upload nothing")
    push.add_argument("--verify", action="store_true", help="download it again, compare every byte, measure again")
    push.add_argument("--verify_samples", type=int, default=32, help="how many samples to measure again")
    push.add_argument("--dataset", help="folder or name of the data measured on; default: the recorded name")
    push.add_argument("--device", help="where to measure again, e.g. cuda; default: cpu")


def _push(args: argparse.Namespace) -> int:
    from hf_robust_vision.hub.push import push_robust_encoder

    settings = {name: value for name, value in vars(args).items() if name not in ("command", "folder", "repo_id")}
    print(push_robust_encoder(args.folder, args.repo_id, **settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
