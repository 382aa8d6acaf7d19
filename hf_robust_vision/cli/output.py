"""How a verb answers: in words for a person, or in JSON for a machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any


def add_json(parser: argparse.ArgumentParser) -> None:
    """The word that asks for JSON."""
    parser.add_argument("--json", action="store_true", help="print the answer as JSON, and all else as errors are")


def answer(args: argparse.Namespace, values: Any, text: str) -> None:
    """Print what came out."""
    print(json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) if args.json else text)


@contextmanager
def working(args: argparse.Namespace) -> Iterator[None]:
    """While a verb works: bars only where a person looks, and nothing beside the answer where JSON is wanted."""
    bars = nullcontext() if sys.stderr.isatty() else _no_bars()
    with bars, redirect_stdout(sys.stderr if args.json else sys.stdout):
        yield


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars of datasets and transformers; afterwards as it was, for a verb may run inside a notebook."""
    import datasets
    from transformers.utils import logging

    shown = not datasets.utils.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown[0]:
            datasets.enable_progress_bars()
        if shown[1]:
            logging.enable_progress_bar()


def answer_with_report(args: argparse.Namespace, results: Any, examples: int, text: Any = None) -> None:
    """Print what was measured and write its report into `--output_dir`, in the first process; then part.

    `text` says the results in words, by default `results_text`.
    """
    from hf_robust_vision.processes import part, rank_and_world
    from hf_robust_vision.report.page import write_report
    from hf_robust_vision.report.tables import results_text

    # The others already wait in `part`: nothing in this branch may talk to them.
    if rank_and_world()[0] == 0:
        pages = [str(page) for page in write_report([args.output_dir], args.output_dir, examples=examples)]
        values = {"schema": 1, "results": [result.to_dict() for result in results], "pages": pages}
        answer(args, values, "\n".join([(text or results_text)(results), *pages]))
    part()
