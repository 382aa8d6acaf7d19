"""Seeded, disjoint parts of a dataset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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


def only_classes(dataset: LabelledImages, class_names: Sequence[str]) -> LabelledImages:
    """The images of some classes; labels and class names stay, so a classifier still chooses among all of them.

    Args:
        dataset: What to choose from.
        class_names: Some of its class names.

    Raises:
        ValueError: If a name is none of the dataset's, or no image is left.
    """
    _need_names(dataset, class_names)
    labels = {label for label, name in enumerate(dataset.class_names) if name in class_names}
    return dataset.select([index for index, label in enumerate(dataset.labels()) if label in labels])


def relabel(dataset: LabelledImages, class_names: Sequence[str]) -> LabelledImages:
    """The images of some classes as a dataset of these classes alone, which knows no other name.

    Fine-tuning on it leaves the other classes unseen: neither their images nor their names take part. Ids stay.

    Args:
        dataset: What to choose from.
        class_names: Some of its class names, in the order of the new labels.

    Raises:
        ValueError: If a name is none of the dataset's or stands twice among them, or no image is left.
    """
    _need_names(dataset, class_names)
    if twice := sorted({name for name in class_names if dataset.class_names.count(name) > 1}):
        raise ValueError(f"{twice[:5]} stand more than once in {dataset.name}; new labels need names that differ.")
    numbers = {dataset.class_names.index(name): number for number, name in enumerate(class_names)}
    return LabelledImages(
        _Renumbered(dataset.rows, dataset.label_column, numbers),
        class_names,
        dataset.transform,
        name=dataset.name,
        split=dataset.split,
        image_column=dataset.image_column,
        label_column=dataset.label_column,
        ids=only_classes(dataset, class_names).ids,
    )


class _Renumbered(Sequence[Mapping[str, Any]]):
    """Rows whose label is looked up in `numbers`; -1 for a class that is left out."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], label_column: str, numbers: Mapping[int, int]):
        self.rows, self.label_column, self.numbers = rows, label_column, numbers

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        return {**row, self.label_column: self.numbers.get(int(row[self.label_column]), -1)}


def _need_names(dataset: LabelledImages, class_names: Sequence[str]) -> None:
    if stray := [name for name in class_names if name not in dataset.class_names]:
        raise ValueError(f"{stray[:5]} are no classes of {dataset.name}; it has {list(dataset.class_names)[:5]}...")


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
