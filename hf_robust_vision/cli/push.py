"""`hf-robust-vision push`."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_robust_vision.terminal import at_least

from .output import add_json, answer, working


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
    """Publish; a model that was measured and has no card yet gets one first."""
    from hf_robust_vision.hub.adversarial import RECORD_NAME
    from hf_robust_vision.hub.push import check_id, push_robust_encoder
    from hf_robust_vision.hub.push_images import push_images
    from hf_robust_vision.hub.release import check_measured
    from hf_robust_vision.processes import check_device

    check_device(args.device)
    folder = Path(args.folder)
    measured = (folder / "robustness.json").is_file() and not (folder / RECORD_NAME).is_file()
    if measured and not (folder / "README.md").exists():
        check_id(args.repo_id)
        check_measured(folder, args.what)  # a push that is refused leaves no card behind
        with working(args):
            print(f"wrote {_write_card(folder, args)}")
    settings = {name: value for name, value in vars(args).items() if name not in OF_THE_VERB}
    push = push_images if (folder / RECORD_NAME).is_file() else push_robust_encoder
    with working(args):
        report = push(folder, args.repo_id, **settings)
    answer(args, asdict(report), str(report))
    return 0


def _write_card(folder: Path, args: argparse.Namespace) -> Path:
    from hf_robust_vision.evaluation.results import load_results
    from hf_robust_vision.hub.card import hardened
    from hf_robust_vision.pipeline.card import describe, history

    results, told = load_results(folder), history(folder)
    original, training = told.pop("original", None), told.pop("training", None)
    for result in hardened(results):
        result.training = result.training or training
    settings = {"model_name": args.repo_id.split("/")[-1], "license": args.license, **told}
    return describe(folder, results, args.base_model or original, **settings)
