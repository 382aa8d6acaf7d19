"""Questions about the demo's images, for the vision-language half of the demo."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from hf_robust_vision.pixels import Fitting, PixelTransform

from .decode import decode_image
from .demo import demo_folder, demo_rows, load_demo
from .splits import seeded_places


PROMPT = "user : <image> {} assistant :"  # of the shipped LLaVA


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Args:
        id: Its place in the split's source file.
        image: Path of the image.
        text: The question.
        answer: One word.
        yes_no: Is the answer yes or no? Such questions are answerable without looking: a blank image scores 79 %.
    """

    id: int
    image: str
    text: str
    answer: str
    yes_no: bool

    @property
    def fingerprint(self) -> str:
        """Hash of the image's file."""
        return _file_sha256(self.image)

    def pixels(self, transform: Fitting) -> torch.Tensor:
        """The image in [0, 1], shape (3, height, width)."""
        return transform.fit(decode_image(self.image, self.image)[None])[0]


def load_questions(split: str, *, yes_no: bool | None = None, limit: int | None = None) -> list[Question]:
    """Questions of the demo's train, validation or test images; no image is in two splits.

    Args:
        split: "train", "validation" or "test".
        yes_no: Only such questions, or only colour and shape questions; None gives both.
        limit: A seeded subset of at most so many.

    Raises:
        ValueError: If there is no such split, or `limit` is under 1.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"the demo has no split {split!r}; it has train, validation and test.")
    questions = [q for q in _all(split) if yes_no is None or q.yes_no == yes_no]
    if limit is None or limit >= len(questions):
        return questions
    return [questions[place] for place in seeded_places(len(questions), limit, seed=0)]


@lru_cache(maxsize=4096)
def _file_sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@lru_cache(maxsize=3)
def _all(split: str) -> tuple[Question, ...]:
    source = "test" if split == "test" else "train"
    folder = demo_folder() / source
    entries = json.loads((folder / "questions.json").read_text())
    held = _validation_numbers() if source == "train" else set()
    wanted = [
        (place, entry)
        for place, entry in enumerate(entries)
        if source == "test" or (entry[2] in held) == (split == "validation")
    ]
    return tuple(
        Question(place, str(Path(folder) / "images" / f"{image}.png"), text, answer, answer in ("yes", "no"))
        for place, (text, answer, image) in wanted
    )


def _validation_numbers() -> set[int]:
    """Numbers of the images in the classification demo's validation split."""
    rows = demo_rows("train")
    return {rows[sample]["number"] for sample in load_demo("validation", PixelTransform(64, (64, 64))).ids}
