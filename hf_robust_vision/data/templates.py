"""Prompt templates and class names, built in or from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from hf_robust_vision.towers.text_bank import check_templates


TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "tecoa": ("This is a photo of a {}.",),
    "demo": ("a photo of a {}", "an image of a {}", "a picture of a {}", "there is a {}", "a {}", "this is a {}"),
    "emoji": ("an emoji of a {}", "a drawing of a {}"),
}


def get_templates(name_or_file: str) -> tuple[str, ...]:
    """Templates by name, or one per line of a text file.

    "{c}" stands for the class name as well as "{}": CLIP_benchmark writes it so.

    Raises:
        ValueError: If it is neither, or `check_templates` refuses a line.
    """
    if name_or_file in TEMPLATES:
        return TEMPLATES[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise ValueError(f"{name_or_file!r} is neither a file nor one of the templates {sorted(TEMPLATES)}.")
    lines = tuple(line.replace("{c}", "{}") for line in _lines(path))
    try:
        check_templates(lines)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return lines


def read_class_names(file: str | Path) -> Sequence[str]:
    """Class names in the order of the labels: a JSON list, or one per line of a text file.

    Raises:
        ValueError: If the file does not exist or holds no list of texts.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"class names: {path} is not a file.")
    names = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else _lines(path)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"class names: {path} must hold a list of texts in the order of the labels.")
    return names


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
