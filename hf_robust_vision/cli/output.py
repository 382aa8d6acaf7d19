"""How a verb answers: in words for a person, or in JSON for a machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_robust_vision.terminal import next_steps, quiet_when_piped


if TYPE_CHECKING:
    from hf_robust_vision.evaluation.results import RobustnessResult


def add_json(parser: argparse.ArgumentParser) -> None:
    """The word that asks for JSON."""
    parser.add_argument("--json", action="store_true", help="print the answer as JSON, and all else as errors are")


def answer(args: argparse.Namespace, values: Any, text: str) -> None:
    """Print what came out."""
    print(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) if args.json else text)


@contextmanager
def working(args: argparse.Namespace) -> Iterator[None]:
    """While a verb works: bars only where a person looks, and nothing beside the answer where JSON is wanted."""
    with quiet_when_piped(), redirect_stdout(sys.stderr if args.json else sys.stdout):
        yield


def run_recipe(words: Sequence[str], recipe: Callable[[list[str]], tuple[Path, list[RobustnessResult]]]) -> int:
    """Run a recipe, which talks for itself; with `--json` among its words it talks where errors go, and the answer is here."""
    rest = [word for word in words if word != "--json"]
    if len(rest) == len(words):
        recipe(rest)
        return 0
    from hf_robust_vision.processes import rank_and_world

    first = rank_and_world()[0] == 0
    args = argparse.Namespace(json=True)
    with working(args):
        folder, results = recipe(rest)
    if first:
        answer(args, {"schema": 1, "output_dir": str(folder), "results": [row.to_dict() for row in results]}, "")
    return 0


def answer_with_report(
    args: argparse.Namespace,
    results: Any,
    examples: int,
    text: Any = None,
    then: Sequence[Sequence[str]] = (),
    more: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Print what was measured, where it lies and what to type `then`, and write the report, in the first process; part.

    `text` says the results in words, by default `results_text`; `more` is what the JSON holds besides.
    """
    from hf_robust_vision.processes import part, rank_and_world
    from hf_robust_vision.report.page import write_report
    from hf_robust_vision.report.tables import lying, results_text

    # The others already wait in `part`: nothing in this branch may talk to them.
    if rank_and_world()[0] == 0:
        pages = [str(page) for page in write_report([args.output_dir], args.output_dir, examples=examples)]
        values = {"schema": 1, "results": [result.to_dict() for result in results], "pages": pages} | more()
        told = [
            (text or results_text)(results),
            "",
            lying(args.output_dir, pages),
            *([next_steps(*then)] if then else []),
        ]
        answer(args, values, "\n".join(told))
    part()
