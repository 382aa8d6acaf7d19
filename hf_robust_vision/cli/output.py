"""How a verb answers: in words for a person, or in JSON for a machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
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
    if not sys.stderr.isatty():
        import datasets
        from transformers.utils import logging

        logging.disable_progress_bar()
        datasets.disable_progress_bars()
    with redirect_stdout(sys.stderr if args.json else sys.stdout):
        yield
