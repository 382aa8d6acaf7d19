"""Images with questions or captions, from a file that lists them."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hf_robust_vision.files import file_sha256, read_json, read_text
from hf_robust_vision.pixels import Fitting

from .decode import CorruptImageError, decode_image


@dataclass(frozen=True)
class Pictured:
    """An image with a text that goes into a prompt."""

    id: int  # its place among the samples
    image: str  # a path
    text: str

    @property
    def fingerprint(self) -> str:
        """Hash of the image's file."""
        return file_sha256(self.image)[:16]

    def pixels(self, transform: Fitting) -> Tensor:
        """The image in [0, 1], shape (3, height, width)."""
        return transform.fit(decode_image(self.image, self.image)[None])[0]


@dataclass(frozen=True)
class Question(Pictured):
    """One question about one image."""

    answer: str  # that counts as right


@dataclass(frozen=True)
class Captioned(Pictured):
    """One image with captions."""

    references: Sequence[str]


P = TypeVar("P", bound=Pictured)


def read_questions(file: str | Path) -> list[Question]:
    """Questions of a `.csv` or `.jsonl` file with "image", "question" and "answer" in every row.

    Paths of images are relative to the file; ids count the rows from 1.

    Raises:
        ValueError: If there is no row, or one lacks something, names no image file, or holds something else than text;
            the message says which.
    """
    return [
        Question(number, image, _text(row, "question", where), _text(row, "answer", where))
        for number, image, row, where in _rows(Path(file), "image, question, answer")
    ]


def read_captioned(file: str | Path) -> list[Captioned]:
    """Images with reference captions, of a `.csv` or `.jsonl` file with "image" and "caption" in every row.

    Rows of one image are its references; in `.jsonl` a "caption" may be a list of them.

    Raises:
        ValueError: As `read_questions`.
    """
    found: dict[str, list[str]] = {}
    for _, image, row, where in _rows(Path(file), "image, caption"):
        several = row["caption"] if isinstance(row.get("caption"), list) and row["caption"] else [row.get("caption")]
        found.setdefault(image, []).extend(_text({"caption": one}, "caption", where) for one in several)
    return [Captioned(number, image, "", captions) for number, (image, captions) in enumerate(found.items(), 1)]


def need_decodable(samples: Sequence[P], *, skip: bool) -> list[P]:
    """The samples whose images can be read; without `skip` the first other one is a `CorruptImageError` that names it."""
    broken = set()
    for image in dict.fromkeys(sample.image for sample in samples):
        try:
            decode_image(image, image)
        except CorruptImageError:
            if not skip:
                raise
            broken.add(image)
    if broken:
        warnings.warn(f"skipped {len(broken)} corrupt images, such as {min(broken)}", stacklevel=2)
    return [sample for sample in samples if sample.image not in broken]


def _rows(file: Path, wanted: str) -> Iterator[tuple[int, str, Mapping[str, Any], str]]:
    """Number, whole path of the image, and values of each row, with what an error calls it."""
    kinds = {".csv": _of_csv, ".jsonl": _of_jsonl}
    if file.suffix.lower() not in kinds:
        raise ValueError(f"{file} must be a .csv or .jsonl file with {wanted} in every row.")
    number = 0
    for number, (line, row) in enumerate(kinds[file.suffix.lower()](file), 1):
        where = f"{file}, line {line}"
        if not isinstance(row, Mapping):
            raise ValueError(f"{where} must be an object with {wanted}.")
        image = file.parent / _text(row, "image", where)
        if not image.is_file():
            raise ValueError(f"{where}: there is no image {image}.")
        yield number, str(image), row, where
    if number == 0:
        raise ValueError(f"{file} holds no rows; wanted {wanted}.")


def _of_csv(file: Path) -> Iterator[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(read_text(file).removeprefix("\ufeff")), strict=True)  # a mark of Excel's
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.reader.line_num} is no CSV ({error}).") from error


def _of_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    for line, text in enumerate(read_text(file).split("\n"), 1):
        if text.strip():
            yield line, read_json(text, f"{file}, line {line}")


def _text(row: Mapping[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):  # an answer may be a number
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} has no {name!r}: wanted text, got {value!r}.")
    return value
