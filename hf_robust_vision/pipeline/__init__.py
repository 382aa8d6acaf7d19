"""Measure, harden, measure again, write it down: what recipes and the command line both call."""

from .arguments import parse
from .harden import run


__all__ = ["parse", "run"]
