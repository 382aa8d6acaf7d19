"""The page of `recipes/research/benchmark.py`: one section a part, each with the command that measured it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def section(title: str, command: str, machine: str, table: Sequence[str]) -> str:
    """One part: its title, how it was measured and where, and its table."""
    return "\n".join([f"## {title}", "", f"Written by `{command}`.", "", f"{machine}.", "", *table, ""])


def merge(page: str, measured: Mapping[str, str], order: Sequence[str]) -> str:
    """The page with the sections that were measured now, and those of the other parts as they were.

    Args:
        page: What the file holds; may be empty.
        measured: Name of a part, with which its title begins, to its section.
        order: Names of all parts, in the order of the page.

    Raises:
        ValueError: If the page holds a section that is of no part: writing would lose it.
    """
    sections = {}
    for text in page.split("\n## ")[1:]:
        name = next((name for name in order if text.startswith(f"{name}:")), None)
        if name is None:
            raise ValueError(f"the page holds a section {text.splitlines()[0]!r}, which this command does not write.")
        sections[name] = f"## {text.strip()}\n"
    sections |= measured
    return "\n".join(["# Benchmark\n", *(sections[name] for name in order if name in sections)])


def update(file: Path, measured: Mapping[str, str], order: Sequence[str]) -> None:
    """Write `merge` of a file into that file."""
    page = file.read_text(encoding="utf-8") if file.is_file() else ""
    file.write_text(merge(page, measured, order), encoding="utf-8")
