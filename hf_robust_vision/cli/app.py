"""`hf-robust-vision app`."""

from __future__ import annotations

import argparse
from typing import Any

from hf_robust_vision.terminal import at_least, quiet_when_piped


def add(commands: Any) -> None:
    """Its words."""
    parser = commands.add_parser("app", help="attack a picture in the browser, a model beside its hardened twin")
    parser.set_defaults(run=run)
    parser.add_argument(
        "--pair",
        nargs=2,
        action="append",
        default=[],
        metavar=("MODEL", "HARDENED"),
        help="folders or Hub ids of a model and its hardened twin, to choose from beside the demo; may stand often",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets others in")
    parser.add_argument("--port", type=at_least(1), help="default: the first free one from 7860 on")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from hf_robust_vision.app.serve import serve

    with quiet_when_piped():
        serve([tuple(pair) for pair in args.pair], host=args.host, port=args.port)
    return 0
