"""The YAML files of the demo and of the published settings, found by name."""

from __future__ import annotations

from pathlib import Path


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
