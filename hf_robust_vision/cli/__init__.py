"""`hf-robust-vision`: measure, compare, attack, harden, swap, convert and publish vision towers from the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hf_robust_vision import __version__
from hf_robust_vision.terminal import Parser, user_errors

from . import (
    app,
    attack,
    card,
    compare,
    convert,
    doctor,
    evaluate,
    evaluate_vlm,
    export,
    harden,
    harden_vlm,
    interpolate,
    load_check,
    push,
    remeasure,
    report,
    swap,
)


VERBS = (
    harden,
    harden_vlm,
    swap,
    evaluate,
    evaluate_vlm,
    attack,
    compare,
    report,
    remeasure,
    interpolate,
    convert,
    export,
    card,
    push,
    app,
    doctor,
    load_check,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command: 0, or 1 where something could not be done, or 2 where a word is wrong; then one line says what.

    130 where it was interrupted, as a shell says it.
    """
    try:
        with user_errors():
            args = make_parser().parse_args(argv)
            status: int = args.run(args)
            return status
    except SystemExit as end:
        if not isinstance(end.code, str):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1


def make_parser() -> Parser:
    """The words of every command."""
    parser = Parser(
        prog="hf-robust-vision",
        description=__doc__,
        epilog="exit status: 0 done; 1 not done, and one line says why; 2 a word is wrong, and nothing was begun; 130 interrupted",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for verb in VERBS:
        verb.add(commands)
    return parser
