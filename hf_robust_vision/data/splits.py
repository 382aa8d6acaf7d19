"""Seeded, disjoint parts of a dataset."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import combinations

import torch

from hf_robust_vision.processes import rank_and_world
from hf_robust_vision.towers.text_bank import check_class_names

from .datasets import LabelledImages


def split_off(dataset: LabelledImages, size: int, *, seed: int, name: str) -> tuple[LabelledImages, LabelledImages]:
    """Draw `size` items for another split called `name`; returns what is left, which is never nothing, and the drawn."""
    if not 0 < size < len(dataset):
        raise ValueError(f"can not draw {size} of the {len(dataset)} items of {dataset.name} ({dataset.split}).")
    order = _shuffled(len(dataset), seed)
    # In their old order: files are read one after the other, and records of a run are easy to find.
    return dataset.select(sorted(order[size:])), dataset.select(sorted(order[:size]), name)


def seeded_subset(dataset: LabelledImages, size: int | None, *, seed: int) -> LabelledImages:
    """The same `size` items for the same seed; all of them if `size` is None or more than there are."""
    if size is None or size >= len(dataset):
        return dataset
    return dataset.select(seeded_places(len(dataset), size, seed=seed))


def seeded_places(length: int, size: int, *, seed: int) -> list[int]:
    """The same `size` of `length` places for the same seed, in rising order."""
    if size < 1:
        raise ValueError(f"a subset needs at least 1 sample, got {size}; without a limit all {length} are taken.")
    return sorted(_shuffled(length, seed)[:size])


def _shuffled(length: int, seed: int) -> Sequence[int]:
    # A generator of its own: what is drawn must not hang on what else was drawn before.
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed)).tolist()


def without_corrupt(dataset: LabelledImages, *, skip: bool) -> LabelledImages:
    """Decode every image once and leave out those that can not be read; the first process says how many.

    Every process of a run must call it. Without `skip` the first such image is a `CorruptImageError` that names it.
    """
    broken = set(dataset.corrupt())
    if broken and not skip:
        dataset[min(broken)]  # raises
    if broken and rank_and_world()[0] == 0:
        warnings.warn(f"skipped {len(broken)} corrupt images of {dataset.name} ({dataset.split})", stacklevel=2)
    return dataset.select([index for index in range(len(dataset)) if index not in broken])


def only_classes(dataset: LabelledImages, class_names: Sequence[str]) -> LabelledImages:
    """The images of some classes; labels and class names stay, so a classifier still chooses among all of them."""
    if stray := [name for name in class_names if name not in dataset.class_names]:
        raise ValueError(f"{stray[:5]} are no classes of {dataset.name}; it has {list(dataset.class_names)[:5]}...")
    # By label and not by name: two classes may have one name.
    labels = {label for label, name in enumerate(dataset.class_names) if name in class_names}
    return dataset.select([index for index, label in enumerate(dataset.labels()) if label in labels])


def relabel(dataset: LabelledImages, class_names: Sequence[str]) -> LabelledImages:
    """The images of some classes as a dataset of these classes alone, in this order, which knows no other name.

    Fine-tuning on it leaves the other classes unseen: neither their images nor their names take part. Ids stay; a name
    that stands twice is a ValueError.
    """
    part = only_classes(dataset, class_names)
    if twice := sorted({n for n in class_names if max(dataset.class_names.count(n), class_names.count(n)) > 1}):
        raise ValueError(f"{twice[:5]} stand more than once in {dataset.name}; new labels need names that differ.")
    check_class_names(class_names)
    # From the rows' own labels, because the dataset may have been relabelled before.
    old = dataset.new_labels or {label: label for label in range(len(dataset.class_names))}
    names = {label: dataset.class_names[number] for label, number in old.items()}
    part.new_labels = {label: class_names.index(name) for label, name in names.items() if name in class_names}
    part.class_names = tuple(class_names)
    return part


def check_disjoint(*datasets: LabelledImages) -> None:
    """Refuse splits that share an image.

    Only splits over the same rows (of one folder, or one fingerprint of `datasets`) can be compared by id; splits of
    different sources are taken at their word.
    """
    for first, second in combinations(datasets, 2):
        marks = [getattr(part.rows, "_fingerprint", id(part.rows)) for part in (first, second)]
        if marks[0] == marks[1] and (shared := set(first.ids) & set(second.ids)):
            raise ValueError(
                f"{first.split} and {second.split} of {first.name} share {len(shared)} images (ids "
                f"{sorted(shared)[:5]}); a number measured on a training image says nothing."
            )
