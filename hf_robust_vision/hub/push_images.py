"""Publish adversarial images as a data set that says what it is: found on one model, transfer only on any other."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard

from hf_robust_vision.report.tables import percent

from .adversarial import CARD_NAME, IMAGES_NAME, METADATA_NAME, RECORD_NAME, AttackRecord, load_record
from .push import PushReport, PushSettings, check_id, check_target, collect, send
from .release import need_inside


LABEL = "transfer-only"
_USELESS = ("what", "base_model", "verify", "dataset", "device")  # settings that only a model has a use for


def push_images(folder: str | Path, repo_id: str, **settings: Any) -> PushReport:
    """Upload a folder that `hf-robust-vision attack` wrote as a data set: picture files, table, card and record.

    The floats of the attack and the results stay at home. As `push_robust_encoder`, one commit holds it all, and deletes
    what an earlier push left; the settings are those of `PushSettings` that are not about models.

    Raises:
        ValueError: If a file is missing, leads out of the folder, or the card does not say that the images show transfer
            only; if a setting has no use here, or the repository's id or the token is missing.
        PushError: If the Hub can not be reached or refuses.
    """
    how, folder = PushSettings(**settings), Path(folder)
    default = {field.name: field.default for field in fields(PushSettings)}
    if useless := [name for name in _USELESS if getattr(how, name) != default[name]]:
        raise ValueError(f"{folder} holds adversarial images, which have no use for --{useless[0]}; leave it out.")
    if how.dry_run:
        check_id(repo_id)
    else:
        check_target(repo_id, how.token)
    record, card = load_record(folder), _card(folder)
    card.data["license"] = how.license or card.data.get("license")
    paths = [RECORD_NAME, METADATA_NAME, *(image.file for image in record.images)]
    if missing := [name for name in paths if not (folder / name).is_file()]:
        raise ValueError(f"{folder / missing[0]} is missing; attack again.")
    need_inside(folder, (folder / name for name in (*paths, CARD_NAME)))
    files: dict[str, Path | bytes] = {name: folder / name for name in paths}
    kind, names, license = "adversarial images", tuple(sorted([*files, CARD_NAME])), card.data.get("license")
    if how.dry_run:
        return PushReport(repo_id, kind, names, license=license)
    repo, info = send(
        folder,
        repo_id,
        how,
        lambda repo: files | {CARD_NAME: str(card).replace('load_dataset(".",', f'load_dataset("{repo}",').encode()},
        "Adversarial images with their record",
        repo_type="dataset",
        replaced=(f"{IMAGES_NAME}/*/*", METADATA_NAME, RECORD_NAME),
    )
    collection = collect(folder, repo, how, _note(record), "dataset")
    return PushReport(repo, kind, names, info.oid, info.pr_url or info.commit_url, license, collection=collection)


def _card(folder: Path) -> DatasetCard:
    if not (folder / CARD_NAME).is_file():
        raise ValueError(f"{folder} has no {CARD_NAME}; attack again, into another folder.")
    card = DatasetCard.load(folder / CARD_NAME)
    if LABEL not in (card.data.get("tags") or []):
        raise ValueError(f"{folder / CARD_NAME} has lost its tag {LABEL!r}: a reader would take the images for more.")
    return card


def _note(record: AttackRecord) -> str:
    told = f"{len(record.images)} images that {record.model} takes rightly in {percent(record.files_accuracy)}"
    return f"{told} of all cases; transfer only for other models."
