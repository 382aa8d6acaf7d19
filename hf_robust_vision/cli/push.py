"""`hf-robust-vision push`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_robust_vision.terminal import at_least

from .output import add_json, answer, working


CARD = "README.md"
OF_THE_VERB = ("command", "run", "json", "folder", "repo_id")  # and no settings of a push


def add(commands: Any) -> None:
    """Its words."""
    push = commands.add_parser(
        "push", help="publish a measured model, or adversarial images, on the Hub, with card and numbers"
    )
    push.set_defaults(run=run)
    push.add_argument(
        "folder", help="what `harden` or `attack` wrote, or a model with the results of `evaluate --output_dir` in it"
    )
    push.add_argument("repo_id", help="owner/name; the token is that of `hf auth login` or HF_TOKEN")
    push.add_argument("--what", choices=("model", "tower", "adapter"), help="default: what the folder holds")
    push.add_argument("--private", action="store_const", const=True, help="create a private repository")
    push.add_argument("--revision", help="branch")
    push.add_argument("--commit_message")
    push.add_argument("--create_pr", action="store_true", help="open a pull request")
    push.add_argument("--base_model", help="Hub id of the original")
    push.add_argument("--license", help="e.g. apache-2.0; default: what the card says, then what the original's says")
    push.add_argument("--collection", metavar="TITLE", help="collection of yours to add it to, made if there is none")
    push.add_argument("--dry_run", action="store_true", help="check everything, upload nothing")
    push.add_argument("--verify", action="store_true", help="download it again, compare every byte, measure again")
    push.add_argument("--verify_samples", type=at_least(1), default=32, help="how many samples to measure again")
    push.add_argument("--dataset", help="folder or name of the data measured on; default: the recorded name")
    push.add_argument("--device", help="where to measure again, e.g. cuda; default: cpu")
    add_json(push)


def run(args: argparse.Namespace) -> int:
    """Publish; a model that was measured and has no card yet gets one first, in a dry run for its time alone."""
    from hf_robust_vision.hub.adversarial import RECORD_NAME
    from hf_robust_vision.hub.push import check_id, push_robust_encoder
    from hf_robust_vision.hub.push_images import push_images
    from hf_robust_vision.processes import check_device

    check_device(args.device)
    folder, made = Path(args.folder), set[Path]()
    measured = (folder / "robustness.json").is_file() and not (folder / RECORD_NAME).is_file()
    settings = {name: value for name, value in vars(args).items() if name not in OF_THE_VERB}
    push = push_images if (folder / RECORD_NAME).is_file() else push_robust_encoder
    try:
        with working(args):
            if measured and not (folder / CARD).exists():
                check_id(args.repo_id)
                made = _write_card(folder, args)
                print(f"{'would write' if args.dry_run else 'wrote'} {folder / CARD}")
            report = push(folder, args.repo_id, **settings)
    finally:
        for file in made if args.dry_run else ():
            file.unlink()
    answer(args, asdict(report), str(report))
    return 0


def _write_card(folder: Path, args: argparse.Namespace) -> set[Path]:
    """Files that were not there before."""
    from hf_robust_vision.pipeline.card import card_from_records

    before, name = set(folder.iterdir()), args.repo_id.split("/")[-1]
    card_from_records(folder, name, args.what, base_model=args.base_model, license=args.license)
    return set(folder.iterdir()) - before
