"""Text files, read as a dataclass says or refused, and written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints


T = TypeVar("T")


def from_plain(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from the fields that a file holds; unknown ones, of a newer version, are left out.

    A field that is missing, of another type, not finite or refused by the class is a ValueError that begins with `where`.
    """
    try:
        return cls(**_checked(cls, values))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _checked(cls: Any, values: Any) -> dict[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"a {cls.__name__} must be a JSON object, got {_shown(values)}.")
    hints = _annotations(cls)
    for item in dataclasses.fields(cls):
        if item.name not in values and dataclasses.MISSING is item.default is item.default_factory:
            raise ValueError(f"{item.name} is missing.")
        if item.name in values and not _fits(values[item.name], hints[item.name]):
            raise ValueError(f"{item.name} must be {item.type}, got {_shown(values[item.name])}.")
    return {name: values[name] for name in hints if name in values}


def read_json(text: str, where: str | Path) -> Any:
    """Parse JSON; where it is none, the ValueError says where it came from."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}).") from error


def read_text(path: Path) -> str:
    """Read a text file; where it is not UTF-8, the ValueError names it."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}).") from error


def write_atomically(path: str | Path, text: str) -> None:
    """Write a text file so that a reader sees the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")  # one a process: two that write at once must not share it
    # Half a name that a file system could not read is nothing that UTF-8 can say: it is written as JSON escapes it.
    draft.write_text(text, encoding="utf-8", errors="backslashreplace")
    draft.replace(path)


def file_sha256(file: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(file, "rb") as content:  # by blocks: an optimizer's state may be larger than the memory left
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@cache
def _annotations(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is UnionType:
        return any(_fits(value, part) for part in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) and _fits(value[key], args[1]) for key in value)
    # To Python True is a number, and JSON of Python may hold NaN: neither is one here.
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, NoneType if hint is None else hint)


def _shown(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
