"""`hf-robust-vision doctor`."""

from __future__ import annotations

import argparse
from typing import Any

from .output import add_json, answer


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("doctor", help="versions, devices, what is missing and what to type")
    parser.set_defaults(run=run)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Look; 1 where something is wrong that the package cannot do without."""
    from hf_robust_vision.doctor import diagnose

    found = diagnose()
    answer(args, found.to_dict(), str(found))
    return 0 if found.healthy else 1
