# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-robust-vision[demo]"]
#
# [tool.uv.sources]
# hf-robust-vision = { path = "..", editable = true }
# ///
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

from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_robust_vision.cli.evaluate import add_measuring, measuring
from hf_robust_vision.configs import read_yaml
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.files import from_plain
from hf_robust_vision.pipeline.measure import EvaluationSet, measure_model, protocol_of, report_and_part
from hf_robust_vision.terminal import Parser, user_errors


KINDS = {
    "protocol": str, "norm": str, "eps": list, "batch_size": int, "seed": int, "steps": int, "restarts": int,
    "queries": int, "defaults": dict, "datasets": list,
}  # fmt: skip


def read_list(file: Path, only: list[str] | None) -> tuple[RobustnessProtocol, list[EvaluationSet]]:
    """The protocol and the datasets of a YAML file, or those of them that are named."""
    values = read_yaml(file)
    refuse_strays(file, values, set(KINDS))
    for name, value in values.items():
        if not isinstance(value, KINDS[name]) or isinstance(value, bool):
            raise ValueError(f"{file}: {name} must be of type {KINDS[name].__name__}, got {value!r}.")
    if missing := sorted({"protocol", "eps", "datasets"} - set(values)):
        raise ValueError(f"{file} lacks {missing}.")
    how = protocol_of(values)
    known = {field.name for field in fields(EvaluationSet)}
    for entry in (values.get("defaults", {}), *values["datasets"]):
        refuse_strays(file, entry, known)
    entries = [values.get("defaults", {}) | entry for entry in values["datasets"]]
    sets = [from_plain(EvaluationSet, entry, str(file)) for entry in entries]
    if stray := sorted(set(only or ()) - {str(part.name) for part in sets}):
        raise ValueError(f"{stray} are no datasets of {file}; it has {[part.name for part in sets]}.")
    return how, [part for part in sets if only is None or part.name in only]


def refuse_strays(file: Path, values: Any, known: set[str]) -> None:
    """A misspelt name must not be read as a default."""
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a dataset is written as lines of `name: value`, got {values!r}.")
    if stray := sorted(set(values) - known):
        raise ValueError(f"{file}: {stray} are no settings; there are {sorted(known)}.")


def main() -> None:
    """Parse, measure, report; bad input ends in one line."""
    parser = Parser(description=__doc__.splitlines()[0])
    add_measuring(parser)
    demo = Path(__file__).parent / "datasets" / "demo.yaml"
    parser.add_argument("--datasets", type=Path, default=demo, help="YAML list")
    parser.add_argument("--only", nargs="+", help="names of some of its datasets")
    parser.add_argument("--output_dir", help="default: outputs/evaluate-<model>")
    args = parser.parse_args()
    with user_errors():
        how, sets = read_list(args.datasets, args.only)
        output_dir = args.output_dir or f"outputs/evaluate-{Path(args.model).name}"
        results = measure_model(args.model, sets, how, output_dir, **measuring(args))
        report_and_part(results, output_dir, args.save_examples)


if __name__ == "__main__":
    main()
