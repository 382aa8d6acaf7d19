"""Measure, harden, measure again, write it down: what recipes and the command line both call."""

from .harden import USER_ERRORS, parse, run


__all__ = ["USER_ERRORS", "parse", "run"]
