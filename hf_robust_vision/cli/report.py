"""`hf-robust-vision report`."""

from __future__ import annotations

import argparse
from typing import Any

from hf_robust_vision.terminal import at_least

from .output import add_json, answer


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("report", help="results to a Markdown page and one self-contained HTML file")
    parser.set_defaults(run=run)
    parser.add_argument("results", nargs="+", help="robustness.json files, or their folders; LABEL=FILE names a model")
    parser.add_argument("--output_dir", default="outputs/report", help="where report.html and report.md go")
    parser.add_argument("--title", default="Robustness report", help="of the page")
    parser.add_argument("--examples", type=at_least(0), default=4, help="attacked images shown for each dataset")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write the pages."""
    from hf_robust_vision.report.page import write_report

    written = write_report(args.results, args.output_dir, title=args.title, examples=args.examples)
    pages = [str(page) for page in written]
    answer(args, {"pages": pages}, "\n".join(pages))
    return 0
