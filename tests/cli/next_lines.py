"""The commands that a verb names at its end, read by the parsers that would read them."""

from __future__ import annotations

import re
import shlex
from importlib import import_module

from hf_robust_vision import pipeline
from hf_robust_vision.cli import make_parser
from hf_robust_vision.cli.harden import METHODS
from hf_robust_vision.pipeline.harden_vlm import VLMArguments, VLMTrainer


def next_lines(said: str) -> list[str]:
    """The words after `hf-robust-vision` of each line; a parser that refuses one ends the test."""
    lines = re.findall(r"^(?:next: | {6})hf-robust-vision (.*)$", said, re.MULTILINE)
    assert lines, said
    for line in lines:
        read(shlex.split(line))
    return lines


def read(words: list[str]) -> None:
    """Parse the words of a verb, those of a method by its recipe's parser."""
    args = make_parser().parse_args(words)
    if args.command == "harden":
        module = import_module(f"hf_robust_vision.methods.{args.method.replace('-', '_')}")
        pipeline.parse(getattr(module, METHODS[args.method][0]), args.words)
    elif args.command == "harden-vlm":
        model = ["--model", *args.words] if args.words and not args.words[0].startswith("-") else args.words
        pipeline.parse(VLMTrainer, model, options=VLMArguments, name="vlm")
