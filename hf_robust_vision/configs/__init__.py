"""The YAML files of the demo and of the published settings, found by name, and how all YAML files are read."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml


def find_config(name: str | Path) -> Path:
    """A YAML file by its path, or one of the shipped files by its name, such as "sim_clip_demo".

    Raises:
        ValueError: If there is no such file; the shipped ones are named.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = {file.stem: file for file in sorted(Path(__file__).parent.glob("*.yaml"))}
    if str(name) not in shipped:
        raise ValueError(
            f"there is no file {name}, and no shipped config of that name; shipped: {', '.join(shipped)}."
        )
    return shipped[str(name)]


def read_yaml(file: str | Path) -> dict[str, Any]:
    """A YAML file of names and values, read strictly.

    Raises:
        ValueError: If it can not be read, is empty or no mapping, names something twice, or holds a tag such as
            `!!python/object`.
    """
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), _Strict)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{file} can not be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(
            f"{file} must hold lines such as `name: value`, got {'nothing' if values is None else values!r}."
        )
    return values


class _Strict(yaml.SafeLoader):
    """The last one of two equal names would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice} stand twice", node.start_mark)
        return super().construct_mapping(node, deep)
