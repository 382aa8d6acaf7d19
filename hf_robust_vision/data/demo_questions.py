"""Questions about the demo's images, for the vision-language half of the demo."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from hf_robust_vision.pixels import PixelTransform

from . import questions
from .demo import demo_folder, demo_rows, demo_source, load_demo
from .splits import seeded_places


PROMPT = "user : <image> {} assistant :"  # of the shipped LLaVA


@dataclass(frozen=True)
class Question(questions.Question):
    """One question about one image, whose id is its place in the source of the split, and whose answer is one word."""

    yes_no: bool  # answered by yes or no; such questions are answerable without looking: a blank image scores 79 %


def load_questions(split: str, *, yes_no: bool | None = None, limit: int | None = None) -> list[Question]:
    """Questions of the demo's train, validation or test images; no image is in two splits.

    `yes_no` gives only such questions, or only those of colour and shape; `limit` a seeded subset of at most so many.
    """
    found = [q for q in _all(split) if yes_no is None or q.yes_no == yes_no]
    if limit is None or limit >= len(found):
        return found
    return [found[place] for place in seeded_places(len(found), limit, seed=0)]


@lru_cache(maxsize=3)
def _all(split: str) -> tuple[Question, ...]:
    source = demo_source(split)
    folder = demo_folder() / source
    # As the classification demo's: no tower may be asked about an image that it was hardened on.
    held: set[int] = set()
    if source == "train":
        rows, validation = demo_rows(source), load_demo("validation", PixelTransform(64, (64, 64)))
        held = {rows[sample]["number"] for sample in validation.ids}
    return tuple(
        Question(place, str(folder / "images" / f"{image}.png"), text, answer, answer in ("yes", "no"))
        for place, (text, answer, image) in enumerate(json.loads((folder / "questions.json").read_text()))
        if source == "test" or (image in held) == (split == "validation")
    )
