"""The offline demo: 24 classes of coloured shapes from the PyPI package `easy-vqa`, and the CLIP shipped for it.

They are 64x64 renderings, not photos: small on purpose, so that every claim can be checked on a laptop. An image of
`easy-vqa` has no label of its own; colour and shape follow from the questions asked about it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from hf_robust_vision.pixels import PixelTransform

from .captions import CaptionedImages
from .datasets import LabelledImages
from .splits import split_off
from .templates import TEMPLATES


DEMO_NAME = "easy-vqa"
DEMO_MODELS = ("demo-clip", "demo-llava", "demo-smolvlm")
DEMO_EPS = 8 / 255
COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
CLASS_NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
# One shape of six colours: held out from fine-tuning, while every colour and every shape is still seen in it. The
# pre-trained demo CLIP knows all 24.
UNSEEN = tuple(f"{colour} {SHAPES[place % 3]}" for place, colour in enumerate(COLOURS[:6]))
VALIDATION_SIZE = 256
_SPLIT_SEED = 0


def demo_checkpoint(name: str = "demo-clip") -> Path:
    """Folder of a checkpoint that the package ships ("demo-clip", "demo-llava", "demo-smolvlm"); a `ValueError` if there is none."""
    folder = Path(__file__).parent / "checkpoints" / name
    if not folder.is_dir():
        raise ValueError(f"no demo checkpoint {name!r}; there are {sorted(p.name for p in folder.parent.iterdir())}.")
    return folder


def shipped(model: str) -> str:
    """The folder of a checkpoint that the package ships, by its name; a folder here and any other name as it is."""
    return str(demo_checkpoint(model)) if model in DEMO_MODELS and not Path(model).is_dir() else model


def load_demo(split: str, transform: PixelTransform) -> LabelledImages:
    """The train, validation or test part of the demo, its images fitted to a tower.

    Train and validation are drawn from the package's training images, test from its test images.
    """
    source = demo_source(split)
    dataset = LabelledImages(demo_rows(source), CLASS_NAMES, transform, name=DEMO_NAME, split=source)
    if split == "test":
        return dataset
    train, validation = split_off(dataset, VALIDATION_SIZE, seed=_SPLIT_SEED, name="validation")
    return train if split == "train" else validation


def demo_source(split: str) -> str:
    """The part of `easy-vqa` that a split of the demo is taken from: "train" or "test"."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"the demo has no split {split!r}; it has train, validation and test.")
    return "test" if split == "test" else "train"


def refuse_ignored(options: Any, *names: str) -> None:
    """Refuse fields of a dataclass that say something of a dataset, where none is named: the demo would not heed them."""
    defaults = {field.name: field.default for field in fields(options)}
    if given := [name for name in names if getattr(options, name) != defaults[name]]:
        raise ValueError(f"{', '.join(given)}: settings of a dataset, but none is named, and the demo has its own.")


def load_demo_captions(split: str, transform: PixelTransform) -> CaptionedImages:
    """A gallery for retrieval: the first image of each of the 24 classes, the demo's six templates as its captions."""
    images = load_demo(split, transform)
    labels = images.labels()
    rows = []
    for label, name in enumerate(CLASS_NAMES):
        image = images.rows[images.ids[labels.index(label)]][images.image_column]
        rows.append({"image": image, "captions": [template.format(name) for template in TEMPLATES["demo"]]})
    return CaptionedImages(rows, transform, name=f"{DEMO_NAME}-captions", split=split)


@lru_cache(maxsize=2)
def demo_rows(source: str) -> Sequence[dict[str, Any]]:
    """Path and class of every image of "train" or "test" whose colour and shape are both known."""
    folder = demo_folder() / source
    possible: dict[int, tuple[set[str], set[str]]] = {}
    for question, answer, image in json.loads((folder / "questions.json").read_text()):
        left = possible.setdefault(image, (set(COLOURS), set(SHAPES)))
        for candidates, values in zip(left, (COLOURS, SHAPES), strict=True):
            _narrow(candidates, set(values), question, answer)
    rows = []
    for image, (colours, shapes) in sorted(possible.items()):
        if len(colours) == 1 and len(shapes) == 1:
            label = CLASS_NAMES.index(f"{colours.pop()} {shapes.pop()}")
            rows.append({"image": str(folder / "images" / f"{image}.png"), "label": label, "number": image})
    return rows


def demo_folder() -> Path:
    """Where the data of `easy-vqa` lies, or a `ModuleNotFoundError` with the line to type."""
    try:
        import easy_vqa
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the demo needs easy-vqa: pip install "hf-robust-vision[demo]"') from error
    return Path(easy_vqa.__file__).parent / "data"


def _narrow(candidates: set[str], values: set[str], question: str, answer: str) -> None:
    """Cut the colours (or shapes) that an image may have to those that one question and its answer allow."""
    words = set(re.findall(r"[a-z]+", question))
    # "what color is the circle?" presumes the circle, so that question and answer both tell of the image.
    open_question = answer not in ("yes", "no")
    named = (words | {answer}) & values
    affirmed = open_question or (answer == "yes") != bool(words & {"not", "no"})
    if named:
        candidates &= named if affirmed else values - named
