"""A measured folder's card with its curve: what every command that leaves a model calls."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.hub.card import license_of, like_the_first, write_card
from hf_robust_vision.report.pictures import plot_curve


def describe(
    folder: Path,
    results: Sequence[RobustnessResult],
    original: str | None,
    dataset: str | None = None,
    **settings: Any,
) -> Path:
    """Write `README.md`, headed by the curve of the first data, into a folder; `settings` are those of `CardSettings`.

    `original` is the folder, Hub id or shipped name of the model that was hardened: its licence is inherited where none
    is named. Without matplotlib there is no curve, and a line says so.
    """
    path = Path(original) if original is not None else None
    # A path of this machine means nothing to the reader of a card; a Hub id does.
    base = path.name if path is not None and path.exists() else original
    data = None if dataset is None or Path(dataset).exists() else dataset
    if settings.get("license") is None and original is not None:
        settings["license"] = license_of(original)
    picture = _curve(results, folder / "robustness.png")
    return write_card(folder, results, base_model=base, dataset=data, picture=picture, **settings)


def _curve(results: Sequence[RobustnessResult], path: Path) -> str | None:
    try:
        return plot_curve(like_the_first(results), path).name
    except ModuleNotFoundError as error:
        print(f"no picture: {error}", file=sys.stderr)
        return None
