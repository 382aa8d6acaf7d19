"""Adversarial images as a data set: the record of how they were made, a card, and a layout that `load_dataset` reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData

from hf_robust_vision.data.demo import DEMO_NAME
from hf_robust_vision.evaluation.results import RobustnessResult, eps_text
from hf_robust_vision.files import from_plain, read_json, read_text, write_atomically
from hf_robust_vision.report.escape import markdown_code, python
from hf_robust_vision.report.protocol import Table
from hf_robust_vision.report.templates import template

from .card import TAGS, license_of


RECORD_NAME = "attack.json"
IMAGES_NAME = "images"
METADATA_NAME = "metadata.parquet"  # its schema keeps the classes, which the words of JSON lines could not
CARD_NAME = "README.md"
SPLIT = "adversarial"  # "test" would be taken for images to measure robustness on
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class AttackedImage:
    """One picture file; where the model was wrong before, or every attack failed, see `fooled_by`."""

    file: str  # relative to the record
    id: int | str  # of the sample in its dataset
    label: str  # true class
    clean: str  # what the model took the clean image for
    adversarial: str | None  # and the attacked one; None where nothing was attacked, and the file is the clean image
    fooled_by: str | None  # the attack that won; "clean" where none was needed, None where none did


@dataclass(frozen=True)
class AttackRecord:
    """How the picture files of a folder were made. They were found on this model: on another, they show transfer only."""

    model: str
    model_sha256: str
    dataset: str
    split: str
    eps: float  # in pixels in [0, 1] if the norm is "linf"
    norm: str
    protocol: str
    attacks: list[dict[str, Any]]
    seed: int
    clean_accuracy: float
    robust_accuracy: float  # on the floats of the attack
    files_accuracy: float  # on the files, whose pixels are rounded to 256 steps, which may undo an attack
    images: list[AttackedImage]
    versions: dict[str, str]
    dataset_id: str | None = None  # owner/name of a data set of the Hub
    class_names: list[str] | None = None  # in the order of the labels

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"schema": 1, **asdict(self)}


def load_record(folder: str | Path) -> AttackRecord:
    """Read what `write_dataset` wrote; what is missing or of another type is a ValueError."""
    path = Path(folder) / RECORD_NAME
    values = read_json(read_text(path), path)
    rows = values.get("images") if isinstance(values, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f'{path} is no {RECORD_NAME}: it must hold an object with a list "images".')
    images = [from_plain(AttackedImage, row, f"{path}: image {n}") for n, row in enumerate(rows, 1)]
    known = {field.name for field in fields(AttackRecord)} - {"images"}
    try:
        return AttackRecord(**{name: value for name, value in values.items() if name in known}, images=images)
    except TypeError as error:
        raise ValueError(f"{path}: {error}") from error


def write_dataset(record: AttackRecord, result: RobustnessResult, folder: Path) -> None:
    """Write record, card and table beside the picture files; the record comes last, it says that all is there."""
    write_metadata(record.images, result.class_names, folder / METADATA_NAME)
    write_atomically(folder / CARD_NAME, str(dataset_card(record, result)))
    write_atomically(folder / RECORD_NAME, json.dumps(record.to_dict(), indent=1, ensure_ascii=False) + "\n")


def write_metadata(images: Sequence[AttackedImage], class_names: Sequence[str], path: Path) -> None:
    """The table that `load_dataset` joins to the picture files: label, answers, and the attack that won."""
    import datasets

    text = datasets.Value("string")
    # Two classes may have one name, which no `ClassLabel` takes.
    unique = len(set(class_names)) == len(class_names)
    label = datasets.ClassLabel(names=list(class_names)) if unique else text
    features = {"file_name": text, "label": label} | dict.fromkeys(("id", "clean", "adversarial", "fooled_by"), text)
    rows = [{"file_name": one.file, **asdict(one), "id": str(one.id)} for one in images]
    if unique:
        rows = [row | {"label": class_names.index(row["label"])} for row in rows]
    columns = {name: [row[name] for row in rows] for name in features}
    table = datasets.Dataset.from_dict(columns, features=datasets.Features(features)).data.table
    import pyarrow.parquet

    pyarrow.parquet.write_table(table, path)


def dataset_card(record: AttackRecord, result: RobustnessResult, license: str | None = None) -> DatasetCard:
    """The card of a folder of `attack`: what the images are good for, and what they must not be taken for.

    The licence is the one of the original images, where it can be read (`license_of`).
    """
    images = len(record.images)
    data = DatasetCardData(
        license=license or _license(record),
        tags=[*TAGS, "adversarial-examples", "transfer-only"],
        task_categories=["image-classification", "zero-shot-image-classification"],
        size_categories=next((size for most, size in _SIZES if images < most), "n>1M"),
        source_datasets=[record.dataset_id] if record.dataset_id else None,
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": SPLIT, "path": [f"{IMAGES_NAME}/**", METADATA_NAME]}],
            }
        ],
    )
    text = template("dataset_card.md").render(
        record=record,
        license=data.license,
        name=markdown_code(record.dataset_id or record.dataset),
        eps=eps_text(record.eps, record.norm),
        fooled=sum(one.fooled_by not in (None, "clean") for one in record.images),
        wrong=sum(one.fooled_by == "clean" for one in record.images),
        table_of=Table([(record.model, result)]),
        call=python(SPLIT),
    )
    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _license(record: AttackRecord) -> str | None:
    if record.dataset == DEMO_NAME and record.dataset_id is None:
        return "mit"  # of easy-vqa
    return license_of(record.dataset_id, "dataset") if record.dataset_id else None
