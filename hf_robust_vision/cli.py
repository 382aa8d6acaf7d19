"""`hf-robust-vision`: measure, report, harden, convert, export and publish from the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any


METHODS = {
    "sim-clip": ("hf_robust_vision.methods.sim_clip", "SimCLIPTrainer"),
    "tima": ("hf_robust_vision.methods.tima", "TIMATrainer"),
    "fare": ("hf_robust_vision.methods.fare", "FARETrainer"),
    "tecoa": ("hf_robust_vision.methods.tecoa", "TeCoATrainer"),
    "pmg-aft": ("hf_robust_vision.methods.pmg_aft", "PMGAFTTrainer"),
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
    from hf_robust_vision.processes import part

    module, name = METHODS[words[0]]
    trainer_class = getattr(import_module(module), name)
    try:
        run(trainer_class, *parse(trainer_class, words[1:]))
        part()
    except USER_ERRORS as error:
        raise ValueError(str(error)) from error
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The words of every command but `harden`, whose words are those of a recipe."""
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
    _evaluation_commands(commands)
    _add_push(commands)
    return parser


def _other(words: list[str]) -> int:
    args = make_parser().parse_args(words)
    if "run" in args:
        status: int = args.run(args)
        return status
    from hf_robust_vision.swap.convert import convert_checkpoint, export_open_clip, export_v4

    if args.command == "convert":
        settings = {"hidden_act": args.hidden_act, "num_attention_heads": args.num_attention_heads}
        print(convert_checkpoint(args.checkpoint, args.base, args.output, **settings))
    elif args.command == "export":
        print((export_open_clip if args.to == "open_clip" else export_v4)(args.model, args.output))
    return 0


def _evaluation_commands(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate", help="clean and robust zero-shot accuracy of a CLIP model, and a report"
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("model", help='folder or Hub id of a CLIPModel, or "demo-clip"')
    evaluate.add_argument("--revision", help="branch, tag or commit of the model")
    evaluate.add_argument("--dataset", help="folder or Hub name; default: the demo")
    evaluate.add_argument("--config", help="configuration of a Hub dataset")
    evaluate.add_argument("--split", default="test")
    evaluate.add_argument("--image_column", help="default: the one of images")
    evaluate.add_argument("--label_column", default="label")
    evaluate.add_argument("--class_names", help="file of class names in label order, local or of the dataset")
    evaluate.add_argument("--templates", help="template set, or a file, local or of the dataset")
    evaluate.add_argument("--resolution", type=int, help="attack square images of this size; default: the tower's")
    evaluate.add_argument("--max_samples", type=int, help="seeded subset; default: all")
    evaluate.add_argument("--skip_corrupt", action="store_true", help="leave out images that can not be decoded")
    evaluate.add_argument("--protocol", default="robustvlm", help="named attacks; a wrong name lists them")
    evaluate.add_argument("--steps", type=int, help="of every attack; default: the protocol's")
    evaluate.add_argument("--restarts", type=int, help="of every attack; default: the protocol's")
    evaluate.add_argument("--queries", type=int, help="of a black-box attack; default: the protocol's")
    evaluate.add_argument("--norm", choices=("linf", "l2"), default="linf")
    evaluate.add_argument("--eps", nargs="+", default=["1/255", "2/255", "4/255"], help="radii, such as 4/255")
    evaluate.add_argument("--batch_size", type=int, default=64)
    evaluate.add_argument("--seed", type=int, default=0)
    evaluate.add_argument("--device", help="default: a GPU where there is one")
    evaluate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    evaluate.add_argument("--name", help="what results call the model; default: its id or folder")
    evaluate.add_argument("--output_dir", default="outputs/evaluate", help="results are added to what it holds")
    evaluate.add_argument("--save_examples", type=int, default=4, metavar="N", help="images kept for the report")
    evaluate.add_argument("--save_adversarial", action="store_true", help="keep the images of all samples")
    evaluate.add_argument("--sanity", action="store_true", help="check the numbers for gradient masking")
    evaluate.add_argument("--surrogate", help="model whose adversarial images the sanity checks try, too")
    evaluate.add_argument("--corruptions", action="store_true", help="accuracy on corrupted images, too")
    report = commands.add_parser("report", help="results to a Markdown page and one self-contained HTML file")
    report.set_defaults(run=_report)
    report.add_argument("results", nargs="+", help="robustness.json files, or their folders; LABEL=FILE names a model")
    report.add_argument("--output_dir", default="outputs/report", help="where report.html and report.md go")
    report.add_argument("--title", default="Robustness report")
    report.add_argument("--examples", type=int, default=4, help="attacked images shown for each dataset")
    again = commands.add_parser("remeasure", help="classify saved adversarial images again, and compare")
    again.set_defaults(run=_remeasure)
    again.add_argument("model", help="the model that was measured")
    again.add_argument("results", help="robustness.json, or its folder")
    again.add_argument("--revision", help="branch, tag or commit of the model")
    again.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="that it was measured in")


def _evaluate(args: argparse.Namespace) -> int:
    import torch

    from hf_robust_vision.attacks import get_protocol
    from hf_robust_vision.evaluation.task import RobustnessProtocol
    from hf_robust_vision.pipeline.measure import EvaluationSet, measure_model
    from hf_robust_vision.processes import part, rank_and_world
    from hf_robust_vision.report.page import results_text, write_report
    from hf_robust_vision.sanity.check import sanity_text
    from hf_robust_vision.training.config import Radius

    how = RobustnessProtocol(
        get_protocol(args.protocol, steps=args.steps, restarts=args.restarts, queries=args.queries),
        tuple(float(Radius(eps)) for eps in args.eps),
        args.norm,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    names = {field.name for field in fields(EvaluationSet)} - {"name", "revision"}
    data = EvaluationSet(**{name: value for name, value in vars(args).items() if name in names})
    results = measure_model(
        args.model,
        [data],
        how,
        args.output_dir,
        name=args.name,
        revision=args.revision,
        device=args.device,
        dtype=getattr(torch, args.dtype),
        examples=args.save_examples,
        save_adversarial=args.save_adversarial,
        sanity=args.sanity,
        surrogate=args.surrogate,
        corruptions=args.corruptions,
    )
    if rank_and_world()[0] == 0:
        print(how, results_text(results), sep="\n")
        if args.sanity:
            print(sanity_text(results))
        print(*write_report([args.output_dir], args.output_dir), sep="\n")
    part()
    return 0


def _report(args: argparse.Namespace) -> int:
    from hf_robust_vision.report.page import write_report

    for path in write_report(args.results, args.output_dir, title=args.title, examples=args.examples):
        print(path)
    return 0


def _remeasure(args: argparse.Namespace) -> int:
    import torch

    from hf_robust_vision.evaluation.results import load_results, pretty_eps
    from hf_robust_vision.evaluation.tasks.zero_shot import remeasure
    from hf_robust_vision.pipeline.measure import bank_of, load_model
    from hf_robust_vision.towers.base import weights_sha256

    path, agree = Path(args.results), True
    encoder, folder = load_model(args.model, revision=args.revision, dtype=getattr(torch, args.dtype))
    sha256 = weights_sha256(encoder)
    mine = [row for row in load_results(path) if row.task == "zero_shot" and row.model_sha256 == sha256]
    results = [row for row in mine if row.images is not None]
    if not results:
        raise ValueError(f"{path} holds no result of {args.model} with saved images; measure with --save_adversarial.")
    for result in results:
        again = remeasure(encoder, bank_of(result, encoder, folder), result, path if path.is_dir() else path.parent)
        agree = agree and not again.changed and not again.outside
        print(
            f"{result.dataset} ({result.split}), {result.protocol}, {result.norm} {pretty_eps(result)}: "
            f"{100 * again.robust_accuracy:.1f} % of {again.num_samples} saved, reported {100 * again.reported:.1f} %; "
            f"flags changed: {again.changed or 'none'}, outside the ball: {again.outside or 'none'}"
        )
    return 0 if agree else 1


def _add_push(commands: Any) -> None:
    push = commands.add_parser("push", help="publish a measured model folder on the Hub, with its card and numbers")
    push.set_defaults(run=_push)
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

    settings = {
        name: value for name, value in vars(args).items() if name not in ("command", "run", "folder", "repo_id")
    }
    print(push_robust_encoder(args.folder, args.repo_id, **settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
