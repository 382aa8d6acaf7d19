"""Measure a CLIP on a list of datasets, and write one report of them all.

The demo, offline:

    python recipes/evaluate.py demo-clip

The 13 zero-shot datasets of the field, from the Hub:

    python recipes/evaluate.py openai/clip-vit-large-patch14 --datasets recipes/datasets/zero_shot_13.yaml

The YAML file names the protocol and the datasets; what `defaults` says holds for every dataset that does not say
otherwise. Killed and started again, it goes on from the last batch. `hf-robust-vision report` puts several models'
results on one page.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.pipeline.measure import EvaluationSet, measure_model
from hf_robust_vision.processes import part, rank_and_world
from hf_robust_vision.report.page import results_text, write_report
from hf_robust_vision.sanity.check import sanity_text
from hf_robust_vision.training.config import Radius


def read_list(file: Path, only: list[str] | None) -> tuple[RobustnessProtocol, list[EvaluationSet]]:
    """The protocol and the datasets of a YAML file, or those of them that are named."""
    values = yaml.safe_load(file.read_text(encoding="utf-8"))
    attacks = {"steps", "restarts", "queries"}
    known = {"protocol", "norm", "eps", "batch_size", "seed", "defaults", "datasets"} | attacks
    refuse_strays(file, values, known)
    if missing := sorted({"protocol", "eps", "datasets"} - set(values)):
        raise ValueError(f"{file} lacks {missing}.")
    how = RobustnessProtocol(
        get_protocol(values["protocol"], **{name: values.get(name) for name in attacks}),
        tuple(float(Radius(eps)) for eps in values["eps"]),
        values.get("norm", "linf"),
        batch_size=values.get("batch_size", 64),
        seed=values.get("seed", 0),
    )
    entries = [values.get("defaults", {}) | entry for entry in values["datasets"]]
    for entry in entries:
        refuse_strays(file, entry, {field.name for field in fields(EvaluationSet)})
    sets = [EvaluationSet(**entry) for entry in entries]
    if stray := sorted(set(only or ()) - {str(part.name) for part in sets}):
        raise ValueError(f"{stray} are no datasets of {file}; it has {[part.name for part in sets]}.")
    return how, [part for part in sets if only is None or part.name in only]


def refuse_strays(file: Path, values: dict[str, Any], known: set[str]) -> None:
    """A misspelt name must not be read as a default."""
    if stray := sorted(set(values) - known):
        raise ValueError(f"{file}: {stray} are no settings; there are {sorted(known)}.")


def main() -> None:
    """Parse, measure, report, and turn bad input into one line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help='folder or Hub id of a CLIPModel, or "demo-clip"')
    parser.add_argument("--datasets", type=Path, default=here / "datasets" / "demo.yaml", help="YAML list")
    parser.add_argument("--only", nargs="+", help="names of some of its datasets")
    parser.add_argument("--output_dir", help="default: outputs/evaluate-<model>")
    parser.add_argument("--name", help="what results call the model; default: its id or folder")
    parser.add_argument("--revision", help="branch, tag or commit of the model")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--save_examples", type=int, default=4, metavar="N", help="images of each dataset kept to show"
    )
    parser.add_argument("--sanity", action="store_true", help="check the numbers for gradient masking")
    parser.add_argument("--surrogate", help="model whose adversarial images the sanity checks try, too")
    parser.add_argument("--corruptions", action="store_true", help="accuracy on corrupted images, too")
    args = parser.parse_args()
    output_dir = args.output_dir or f"outputs/evaluate-{Path(args.model).name}"
    try:
        how, sets = read_list(args.datasets, args.only)
        results = measure_model(
            args.model,
            sets,
            how,
            output_dir,
            name=args.name,
            revision=args.revision,
            device=args.device,
            dtype=getattr(torch, args.dtype),
            examples=args.save_examples,
            sanity=args.sanity,
            surrogate=args.surrogate,
            corruptions=args.corruptions,
        )
        if rank_and_world()[0] == 0:
            print(how, results_text(results), sep="\n")
            if args.sanity:
                print(sanity_text(results))
            print(*write_report([output_dir], output_dir), sep="\n")
        part()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
