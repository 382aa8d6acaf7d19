"""A measured folder's card with its curve: what every command that leaves a model calls."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_robust_vision.evaluation.results import RobustnessResult, load_results
from hf_robust_vision.hub.card import hardened, license_of, like_the_first, write_card
from hf_robust_vision.hub.release import PICTURE, check_measured
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.report.pictures import plot_curve
from hf_robust_vision.towers.records import HARDEN_REPORT, REPORTS, SWAP_REPORT


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
    picture = _curve(results, folder / PICTURE)
    return write_card(folder, results, base_model=base, dataset=data, picture=picture, **settings)


def card_from_records(
    folder: Path, name: str, what: str | None = None, *, base_model: str | None = None, license: str | None = None
) -> Path:
    """Write the card of a measured model by what lies beside it, and return its path; see `describe`.

    Args:
        folder: Of the model, with `robustness.json`.
        name: Title of the card.
        what: As in `PushSettings`.
        base_model: Hub id of the original; default: what the record says.
        license: Default: what the original's card says.

    Raises:
        ValueError: If the model was not measured, or other weights were, or a record is damaged; no card is left then.
    """
    check_measured(folder, what)
    results, told = load_results(folder), history(folder)
    original, training = told.pop("original", None), told.pop("training", None)
    for result in hardened(results):
        result.training = result.training or training
    return describe(folder, results, base_model or original, model_name=name, license=license, **told)


def history(folder: Path) -> dict[str, Any]:
    """What the record beside a model tells of its making: `original`, `training`, and settings of the card.

    Raises:
        ValueError: If the record is damaged.
    """
    for name in REPORTS:
        if not (folder / name).is_file():
            continue
        try:
            told = json.loads((folder / name).read_text(encoding="utf-8"))
            if name == HARDEN_REPORT:
                about = {"tags": SimCLIPTrainer.tag_names, "paper": SimCLIPTrainer.paper}
                return {"original": told["original"], "training": told["training"], **about}
            if name == SWAP_REPORT:
                return {"original": told.get("original"), "tower": told["source"]}
            return {"original": told["original"]["model"]}
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{folder / name} can not be read ({error!r}); delete it, or make the model again."
            ) from error
    return {}


def _curve(results: Sequence[RobustnessResult], path: Path) -> str | None:
    try:
        return plot_curve(like_the_first(results), path).name
    except ModuleNotFoundError as error:
        print(f"no picture: {error}", file=sys.stderr)
        return None
