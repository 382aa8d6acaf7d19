"""Labelled images as the rest of the package reads them: float tensors in [0, 1] with a label and a stable id."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.processes import gather, rank_and_world, usable_cores
from hf_robust_vision.towers.text_bank import check_class_names

from .decode import CorruptImageError, decode_image, undecoded


class _Labelled:
    """What datasets and streams of labelled images share."""

    new_labels: Mapping[int, int] | None = None  # of the rows' labels; -1 for any other
    hub_id: str | None = None  # owner/name of a data set of the Hub

    def __init__(
        self,
        rows: Any,
        class_names: Sequence[str],
        transform: PixelTransform,
        *,
        name: str,
        split: str,
        columns: tuple[str, str | None] = ("image", "label"),
    ):
        if columns[1] is not None:
            check_class_names(class_names)
        self.image_column, self.label_column = columns
        self.rows, self.class_names, self.transform = undecoded(rows, columns[0]), tuple(class_names), transform
        self.name, self.split = name, split
        self._prepare()

    def _prepare(self) -> None:
        """What can be told before a row is read: of a stream nothing."""

    def _item(self, row: Mapping[str, Any], sample: int) -> dict[str, Any]:
        image, label = self._decode(row, sample), 0
        if self.label_column is not None:
            label = self._number(row[self.label_column])
            self._need_names({label})
        return {"images": self.transform.fit(image[None])[0], "labels": label, "ids": sample}

    def _decode(self, row: Mapping[str, Any], sample: int) -> Tensor:
        image = row[self.image_column]
        path = image.get("path") if isinstance(image, Mapping) else image
        named = isinstance(path, str | Path) and str(path)
        return decode_image(image, str(path) if named else f"image {sample} of {self.name}")

    def _number(self, value: Any) -> int:
        try:
            label = operator.index(value)  # `int` would make 1 of 1.7
        except TypeError as error:
            raise ValueError(
                f"label {value!r} is no whole number; labels are places in the list of class names "
                "(datasets: rows.class_encode_column of texts, rows.cast_column to int64 of floats)."
            ) from error
        return label if self.new_labels is None else self.new_labels.get(label, -1)

    def _need_names(self, labels: set[int]) -> None:
        most = len(self.class_names)
        if stray := sorted(label for label in labels if not 0 <= label < most):
            raise ValueError(
                f"labels {stray[:5]} have no class name: there are {most} names, for labels 0 to {most - 1}. The names "
                "must stand in the order of the labels."
            )


class LabelledImages(_Labelled, Dataset):
    """A map-style dataset of labelled images.

    Each item is `{"images": (3, height, width) in [0, 1], "labels": int, "ids": int}`. The id is the row's place in
    the source, so it names the same image after any selection or shuffle.

    Args:
        rows: Any sequence of mappings with an image and a label, such as a `datasets.Dataset`.
        class_names: Names in the order of the labels.
        transform: Fits each image to the tower.
        name: Of the dataset, for results, as is `split`.
        columns: Keys of the image and of the label; None for images without labels, which all get 0.

    Raises:
        ValueError: If the dataset is empty, a column is missing, or there are fewer than two classes.
    """

    def _prepare(self) -> None:
        if len(self.rows) == 0:
            raise ValueError(f"{self.name} ({self.split}) holds no images.")
        columns = self.rows.column_names if hasattr(self.rows, "column_names") else self.rows[0]
        need_columns(columns, self.image_column, self.label_column)
        self.ids = list(range(len(self.rows)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._item(self.rows[self.ids[index]], self.ids[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def labels(self) -> list[int]:
        """All labels, without decoding an image; 0 where there are none."""
        if self.label_column is None:
            return [0] * len(self)
        if hasattr(self.rows, "column_names"):  # a `datasets.Dataset`: its rows hold the images, too
            column = self.rows[self.label_column][:]  # at once: one by one, each would be a look into the table
            return [self._number(column[sample]) for sample in self.ids]
        return [self._number(self.rows[sample][self.label_column]) for sample in self.ids]

    def select(self, indices: Sequence[int], split: str | None = None) -> LabelledImages:
        """Some of the items, which keep their ids; none is a ValueError."""
        part = copy.copy(self)
        part.split, part.ids = split or self.split, [self.ids[index] for index in indices]
        if not part.ids:
            raise ValueError(f"{self.name} ({part.split}): no image of {len(self)} is left.")
        return part

    def check_labels(self) -> None:
        """Refuse labels that are not the index of a class name."""
        if self.label_column is not None:
            self._need_names(set(self.labels()))

    def corrupt(self) -> list[int]:
        """Decode every image once, shared out over threads and processes; indices of those that can not be read."""
        rank, world = rank_and_world()
        mine = range(rank, len(self), world)
        # Threads: PIL decodes outside the interpreter's lock, and nothing need be sent from process to process.
        with ThreadPool(max(usable_cores() // world, 1)) as pool:
            whole = pool.imap(self._is_whole, mine, chunksize=16)
            bar = tqdm(whole, desc=f"reading {self.split}", total=len(mine), delay=2, disable=rank > 0)
            return sorted(gather([index for index, fine in zip(mine, bar) if not fine]))

    def _is_whole(self, index: int) -> bool:
        try:
            self._decode(self.rows[self.ids[index]], self.ids[index])
        except CorruptImageError:
            return False
        return True


class StreamedImages(_Labelled, IterableDataset):
    """The same items from a `datasets.IterableDataset`, numbered in the order of the stream.

    With several loader workers or processes the numbers differ from those of one, but no two images share one. The
    arguments are those of `LabelledImages`; columns are looked for in each row, because a stream may not know its own.
    """

    rank, world = 0, 1
    skip_corrupt, skipped = False, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Each worker of each process reads its own shards and counts from 0: they take turns at the numbers.
        worker = get_worker_info()
        place, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        first, stride = self.rank * workers + place, self.world * workers
        for sample, row in zip(count(first, stride), self.rows):
            need_columns(row, self.image_column, self.label_column)
            try:
                item = self._item(row, sample)
            except CorruptImageError:
                if not self.skip_corrupt:
                    raise
                self.skipped += 1
                continue
            yield item

    def without_corrupt(self) -> StreamedImages:
        """This stream without images that can not be decoded; `skipped` counts them."""
        return self._but(skip_corrupt=True)

    def shuffled(self, seed: int) -> StreamedImages:
        """This stream through a buffer of 10,000 rows, shuffled anew at each epoch."""
        return self._but(rows=self.rows.shuffle(seed=seed, buffer_size=10_000))

    def share(self, rank: int, world: int) -> StreamedImages:
        """What one of several processes reads; no image goes to two of them.

        Where the number of shards is a multiple of `world`, a process opens its own shards only; else all read all
        rows and each decodes its own.
        """
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self.rows, rank, world) if world > 1 else self.rows
        return self._but(rank=rank, world=world, rows=rows)

    def _but(self, **changes: Any) -> StreamedImages:
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle a stream that shuffles, as `Trainer` asks at each epoch."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


def need_columns(columns: Any, *wanted: str | None) -> None:
    """Refuse rows without one of these columns; None asks for none."""
    if missing := [column for column in wanted if column is not None and column not in columns]:
        raise ValueError(
            f"the dataset has no column {missing[0]!r}, only {sorted(columns)}; set image_column and label_column."
        )
