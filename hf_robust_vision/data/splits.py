"""Seeded, disjoint parts of a dataset."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .datasets import LabelledImages


def split_off(dataset: LabelledImages, size: int, *, seed: int, name: str) -> tuple[LabelledImages, LabelledImages]:
    """Draw `size` items for another split; returns what is left and what was drawn.

    Args:
        dataset: What to draw from.
        size: Items to draw.
        seed: Of the drawing.
        name: Split name of the part drawn.

    Raises:
        ValueError: If nothing would be left.
    """
    if not 0 < size < len(dataset):
        raise ValueError(f"can not draw {size} of the {len(dataset)} items of {dataset.name} ({dataset.split}).")
    order = _shuffled(len(dataset), seed)
    return dataset.select(sorted(order[size:])), dataset.select(sorted(order[:size]), name)


def seeded_subset(dataset: LabelledImages, size: int | None, *, seed: int) -> LabelledImages:
    """The same `size` items for the same seed; all of them if `size` is None or more than there are."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(sorted(_shuffled(len(dataset), seed)[:size]))


def check_disjoint(*datasets: LabelledImages) -> None:
    """Refuse splits that share an image.

    Only splits over the same rows can be compared by id; splits of different sources are taken at their word.

    Raises:
        ValueError: If two splits hold the same row.
    """
    for index, first in enumerate(datasets):
        for second in datasets[index + 1 :]:
            shared = set(first.ids) & set(second.ids) if first.rows is second.rows else set()
            if shared:
                raise ValueError(
                    f"{first.split} and {second.split} of {first.name} share {len(shared)} images (ids "
                    f"{sorted(shared)[:5]}); a number measured on a training image says nothing."
                )


def _shuffled(length: int, seed: int) -> Sequence[int]:
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()
