"""`hf-robust-vision evaluate`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from hf_robust_vision.terminal import at_least

from .output import add_json, answer_with_report, working


EPS = ("1/255", "2/255", "4/255")


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("evaluate", help="clean and robust zero-shot accuracy of a CLIP model, and a report")
    parser.set_defaults(run=run)
    add_data(parser)
    add_attack(parser)
    parser.add_argument("--eps", nargs="+", default=EPS, help=f"radii; default: {' '.join(EPS)}")
    parser.add_argument("--save_adversarial", action="store_true", help="keep the images of all samples")
    parser.add_argument("--output_dir", default="outputs/evaluate", help="results are added to what it holds")
    add_measuring(parser)
    add_json(parser)


def add_data(parser: argparse.ArgumentParser) -> None:
    """The words that name a labelled dataset, for `data`."""
    parser.add_argument("--dataset", "--dataset_name", help="folder or Hub name; default: the demo")
    parser.add_argument("--config", help="configuration of a Hub dataset")
    parser.add_argument("--split", default="test", help="of the dataset")
    parser.add_argument("--image_column", help="default: the one of images")
    parser.add_argument("--label_column", default="label", help="column of the class")
    parser.add_argument(
        "--class_names", help="file of names in label order, local or of the dataset, or openai-imagenet"
    )
    parser.add_argument(
        "--templates",
        help="photo, tecoa, openai-7, openai-80 or a file, found as that of --class_names is; default: photo",
    )
    parser.add_argument(
        "--resolution", type=at_least(1), help="attack square images of this size; default: the tower's"
    )
    parser.add_argument("--max_samples", type=at_least(1), help="seeded subset; default: all")
    parser.add_argument("--skip_corrupt", action="store_true", help="leave out images that can not be decoded")


def add_attack(parser: argparse.ArgumentParser) -> None:
    """The words that say how is attacked, but the radii."""
    parser.add_argument("--protocol", default="robustvlm", help="named attacks; a wrong name lists them")
    parser.add_argument("--steps", type=at_least(1), help="of every attack; default: the protocol's")
    parser.add_argument("--restarts", type=at_least(1), help="of every attack; default: the protocol's")
    parser.add_argument("--queries", type=at_least(1), help="of a black-box attack; default: the protocol's")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf", help="of the perturbation")
    parser.add_argument("--batch_size", type=at_least(1), default=64, help="images attacked at once")
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the random starts")


def add_named(parser: argparse.ArgumentParser) -> None:
    """The words that say what a model is called, and which of its versions is meant."""
    parser.add_argument("--name", help="what results call the model; default: its id or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """The words that say where a model runs, and in what."""
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the model")


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """The words that do not depend on the data: `recipes/evaluate.py` has them, too."""
    parser.add_argument("model", help='folder or Hub id of a CLIPModel, or "demo-clip"')
    add_named(parser)
    add_loading(parser)
    parser.add_argument("--save_examples", type=at_least(0), default=4, metavar="N", help="images kept to show")
    parser.add_argument("--sanity", action="store_true", help="check the numbers for gradient masking")
    parser.add_argument("--samples", type=at_least(1), metavar="N", help="of the sanity checks; default: 100")
    parser.add_argument("--surrogate", help="model whose adversarial images the sanity checks try, too")
    parser.add_argument("--corruptions", action="store_true", help="accuracy on corrupted images, too")


def measuring(args: argparse.Namespace) -> Any:
    """What `add_measuring` read, for `measure_model`."""
    import torch

    from hf_robust_vision.pipeline.measure import Measuring

    values = {name: value for name, value in vars(args).items() if name in Measuring.__annotations__}
    shown = {"examples": args.save_examples, "progress": sys.stderr.isatty()}
    return values | {"dtype": getattr(torch, args.dtype)} | shown


def data(args: argparse.Namespace) -> Any:
    """What `add_data` read, as an `EvaluationSet`."""
    from hf_robust_vision.pipeline.measure import EvaluationSet

    names = {field.name for field in fields(EvaluationSet)} - {"name", "revision"}
    return EvaluationSet(**{name: value for name, value in vars(args).items() if name in names})


def chosen(args: argparse.Namespace) -> list[str]:
    """What was typed of the data, the attack and the radii, for another verb to measure alike."""
    parser = argparse.ArgumentParser()
    add_data(parser)
    add_attack(parser)
    words = []
    for name, default in (vars(parser.parse_args([])) | {"eps": EPS}).items():
        value = getattr(args, name)
        if value != default:
            words += [f"--{name}"] if value is True else [f"--{name}", *map(str, value if name == "eps" else [value])]
    return words


def run(args: argparse.Namespace) -> int:
    """Measure, print, report."""
    with working(args):
        from hf_robust_vision.pipeline.measure import measure_model, measured_text, protocol_of

        results = measure_model(args.model, [data(args)], protocol_of(vars(args)), args.output_dir, **measuring(args))
    from hf_robust_vision.data.demo import shipped

    own = ["--dataset", args.dataset] if args.dataset else []
    # A model that is named would leave out the settings of the demo.
    demo = not args.dataset and shipped(args.model) != args.model
    harden = ["harden", "fare", *([] if demo else ["--model", args.model, *own])]
    then = (harden, ["compare", args.model, "OTHER_MODEL", *chosen(args)])
    answer_with_report(args, results, args.save_examples, measured_text, then)
    return 0
