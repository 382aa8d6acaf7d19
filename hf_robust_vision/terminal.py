"""What every command shares: a parser that says one line about a wrong word, and the boundary that errors end at."""

from __future__ import annotations

import argparse
import pickle
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn


MENDABLE = (ValueError, OSError, ModuleNotFoundError, EOFError, pickle.UnpicklingError)
# By name, so that `--help` loads none of these packages.
MENDABLE_ELSEWHERE = {
    "yaml.error.YAMLError",
    "safetensors_rust.SafetensorError",
    "datasets.exceptions.DatasetsError",
    "hf_robust_vision.training.collapse.CollapseError",
}


@contextmanager
def user_errors() -> Iterator[None]:
    """End in one line, `error: ...`, and exit status 1 where the user can mend what went wrong; 130 after Ctrl-C.

    Wrong values, files that can not be read or written, missing packages, refused pickles. Anything else is a fault of
    the program and keeps its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        raise SystemExit(130) from None  # as a shell says it
    except Exception as error:
        if not mendable(error):
            raise
        raise SystemExit(f"error: {one_line(error)}") from error


def mendable(error: BaseException) -> bool:
    """Whether a user can mend it."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    # torch reports a full disk and a cut-off file as RuntimeError of its archive reader and writer.
    archive = "inline_container" in str(error) or "PytorchStream" in str(error)
    return isinstance(error, MENDABLE) or bool(names & MENDABLE_ELSEWHERE) or archive


def one_line(error: BaseException) -> str:
    """What an error says, on one line, with the cause that `datasets` hides."""
    said = " ".join(str(error).split()) or type(error).__name__
    cause = error.__cause__
    hidden = cause is not None and type(error).__module__.startswith("datasets.")
    return f"{said} ({one_line(cause)})" if hidden and cause is not None else said


@contextmanager
def quiet_when_piped() -> Iterator[None]:
    """Without the bars of datasets and transformers where nobody looks; afterwards as it was, as in a notebook."""
    if sys.stderr.isatty():
        yield
        return
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


def next_steps(*commands: Sequence[str]) -> str:
    """What to type now: one command a line; a word in capitals stands for what only the reader knows."""
    lines = [shlex.join(["hf-robust-vision", *command]) for command in commands]
    return "next: " + "\n      ".join(lines)


class Parser(argparse.ArgumentParser):
    """A wrong word is one line and exit status 2; help shows the defaults; no flag is guessed from its beginning."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", Defaults)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As ever, but a command, not the program, says that it does not know a word."""
        found, stray = super().parse_known_args(args, namespace)
        if stray:
            self.error(f"there is no {' '.join(stray)}")
        return found, []

    def error(self, message: str) -> NoReturn:
        """End in one line."""
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults that say something, and each flag in one spelling."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=119)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        default = self._get_default_metavar_for_optional(action)
        return f"{action.option_strings[0]} {self._format_args(action, default)}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {"int": "N", "float": "X"}.get(getattr(action.type, "__name__", ""), "VALUE")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False or "default:" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of a command line, not below `least`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"wanted a whole number of at least {least}, got {text!r}")
        return number

    read.__name__ = "int"
    return read
