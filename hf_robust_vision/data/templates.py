"""Prompt templates and class names, built in or from a file."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from hf_robust_vision.towers.text_bank import check_templates


# OpenAI's prompts and names for ImageNet, MIT licensed, from github.com/openai/CLIP (Prompt_Engineering_for_ImageNet).
# Most published zero-shot accuracies on ImageNet are of these.
_OPENAI = json.loads(Path(__file__).with_name("openai.json").read_text(encoding="utf-8"))
IMAGENET: dict[str, str] = _OPENAI["imagenet"]  # WordNet id to name, in the order of ImageNet's labels
TEMPLATES: dict[str, tuple[str, ...]] = {
    "photo": ("a photo of a {}.",),
    "tecoa": ("This is a photo of a {}.",),
    "demo": ("a photo of a {}", "an image of a {}", "a picture of a {}", "there is a {}", "a {}", "this is a {}"),
    "emoji": ("an emoji of a {}", "a drawing of a {}"),
    "openai-7": tuple(_OPENAI["templates-7"]),
    "openai-80": tuple(_OPENAI["templates-80"]),
}
CLASS_NAMES = {"openai-imagenet": tuple(IMAGENET.values())}


def get_templates(name_or_file: str) -> tuple[str, ...]:
    """Templates by name, or one per line of a text file.

    "{c}" stands for the class name as well as "{}": CLIP_benchmark writes it so.
    """
    if name_or_file in TEMPLATES:
        return TEMPLATES[name_or_file]
    path = Path(name_or_file)
    if not path.is_file():
        raise ValueError(f"{name_or_file!r} is neither a file nor one of the templates {sorted(TEMPLATES)}.")
    lines = tuple(line.replace("{c}", "{}") for line in _lines(path))
    try:
        check_templates(lines)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return lines


def read_class_names(name_or_file: str | Path) -> Sequence[str]:
    """Class names in the order of the labels: a built-in list, a JSON list, or one per line of a text file."""
    if name_or_file in CLASS_NAMES:
        return CLASS_NAMES[str(name_or_file)]
    path = Path(name_or_file)
    if not path.is_file():
        raise ValueError(f"class names: {path} is not a file, nor one of the lists {sorted(CLASS_NAMES)}.")
    names = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else _lines(path)
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"class names: {path} must hold a list of texts in the order of the labels.")
    return names


def without_wordnet_ids(names: Sequence[str]) -> Sequence[str]:
    """OpenAI's names, where all names are WordNet ids, as those of ImageNet's folders are; any others as they are."""
    if not names or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    if strange := [name for name in names if name not in IMAGENET]:
        warnings.warn(
            f"{len(strange)} of {len(names)} class names are WordNet ids that are not ImageNet's, such as "
            f"{strange[0]}: a prompt says nothing by them; name a file of names (--class_names FILE).",
            stacklevel=2,
        )
        return names
    return [IMAGENET[name] for name in names]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
