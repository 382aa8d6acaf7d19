"""The image processor and the tokenizer of a model's folder or Hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer

from .weights import local_or_hub


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a folder or Hub id."""
    return AutoTokenizer.from_pretrained(local_or_hub(name_or_path), revision=revision)


def load_image_processor(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """The image processor of a folder or Hub id.

    Raises:
        ValueError: If there is none.
    """
    try:
        return AutoImageProcessor.from_pretrained(local_or_hub(name_or_path), revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name_or_path} has no image processor (preprocessor_config.json), so its pixel mean and std are unknown: "
            f"{error}"
        ) from error
