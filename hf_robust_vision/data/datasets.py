"""Labelled images as the rest of the package reads them: float tensors in [0, 1] with a label and a stable id."""

from __future__ import annotations

import copy
import operator
import os
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
from .folders import DATA_SUFFIXES, holds, read_folder, split_folder


# What an image column is called where nothing else tells it apart, in the order in which it is looked for.
IMAGE_COLUMNS = ("image", "webp", "jpg", "jpeg", "png")


class LabelledImages(Dataset):
    """A map-style dataset of labelled images.

    Each item is `{"images": (3, height, width) in [0, 1], "labels": int, "ids": int}`. The id is the row's place in
    the source, so it names the same image after any selection or shuffle.

    Args:
        rows: Any sequence of mappings with an image and a label, such as a `datasets.Dataset`.
        class_names: Names in the order of the labels.
        transform: Fits each image to the tower.
        name: Of the dataset, for results.
        split: Of the dataset, for results.
        image_column: Key of the image.
        label_column: Key of the label.
        ids: Place of each row in the source; by default its index.

    Raises:
        ValueError: If the dataset is empty, a column is missing, or there are fewer than two classes.
    """

    def __init__(
        self,
        rows: Any,
        class_names: Sequence[str],
        transform: PixelTransform,
        *,
        name: str,
        split: str,
        image_column: str = "image",
        label_column: str = "label",
        ids: Sequence[int] | None = None,
    ):
        check_class_names(class_names)
        if len(rows) == 0:
            raise ValueError(f"{name} ({split}) holds no images.")
        _need_columns(rows[0] if not hasattr(rows, "column_names") else rows.column_names, image_column, label_column)
        self.rows, self.class_names, self.transform = undecoded(rows, image_column), tuple(class_names), transform
        self.name, self.split = name, split
        self.image_column, self.label_column = image_column, label_column
        self.ids = list(range(len(rows))) if ids is None else list(ids)
        self.new_labels: Mapping[int, int] | None = None  # of the rows' labels; -1 for any other

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[self.ids[index]]
        label = self._number(row[self.label_column])
        return _item(self._decode(index, row), label, self.ids[index], self.transform, self.class_names)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def labels(self) -> list[int]:
        """All labels, without decoding an image."""
        if hasattr(self.rows, "column_names"):  # a `datasets.Dataset`: its rows hold the images, too
            column = self.rows[self.label_column][:]  # at once: one by one, each would be a look into the table
            return [self._number(column[sample]) for sample in self.ids]
        return [self._number(self.rows[sample][self.label_column]) for sample in self.ids]

    def select(self, indices: Sequence[int], split: str | None = None) -> LabelledImages:
        """Some of the items, which keep their ids.

        Raises:
            ValueError: If there are none.
        """
        part = copy.copy(self)
        part.split, part.ids = split or self.split, [self.ids[index] for index in indices]
        if not part.ids:
            raise ValueError(f"{self.name} ({part.split}): no image of {len(self)} is left.")
        return part

    def check_labels(self) -> None:
        """Refuse labels that are not the index of a class name."""
        _check_labels(set(self.labels()), self.class_names)

    def corrupt(self) -> list[int]:
        """Decode every image once, shared out over threads and processes; indices of those that can not be read."""
        rank, world = rank_and_world()
        mine = range(rank, len(self), world)
        with ThreadPool(max(usable_cores() // world, 1)) as pool:
            whole = pool.imap(self._is_whole, mine, chunksize=16)
            bar = tqdm(whole, desc=f"reading {self.split}", total=len(mine), delay=2, disable=rank > 0)
            return sorted(gather([index for index, fine in zip(mine, bar) if not fine]))

    def _is_whole(self, index: int) -> bool:
        try:
            self._decode(index, self.rows[self.ids[index]])
        except CorruptImageError:
            return False
        return True

    def _decode(self, index: int, row: Mapping[str, Any]) -> Tensor:
        image = row[self.image_column]
        path = image.get("path") if isinstance(image, Mapping) else image
        named = isinstance(path, str | Path) and str(path)
        return decode_image(image, str(path) if named else f"image {self.ids[index]} of {self.name}")

    def _number(self, value: Any) -> int:
        label = _label(value)
        return label if self.new_labels is None else self.new_labels.get(label, -1)


class StreamedImages(IterableDataset):
    """The same items from a `datasets.IterableDataset`, numbered in the order of the stream.

    With several loader workers or processes the numbers differ from those of one, but no two images share one.

    Args:
        stream: A `datasets` stream with an image and a label column.
        class_names: Names in the order of the labels.
        transform: Fits each image to the tower.
        name: Of the dataset, for results.
        split: Of the dataset, for results.
        image_column: Key of the image.
        label_column: Key of the label.
        skip_corrupt: Leave out images that can not be decoded; `skipped` counts them.
    """

    def __init__(
        self,
        stream: Any,
        class_names: Sequence[str],
        transform: PixelTransform,
        *,
        name: str,
        split: str,
        image_column: str = "image",
        label_column: str = "label",
        skip_corrupt: bool = False,
    ):
        check_class_names(class_names)
        self.stream, self.class_names, self.transform = undecoded(stream, image_column), tuple(class_names), transform
        self.name, self.split, self.skip_corrupt, self.skipped = name, split, skip_corrupt, 0
        self.image_column, self.label_column = image_column, label_column
        self.rank, self.world = 0, 1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        # Each worker of each process reads its own shards and counts from 0: they take turns at the numbers.
        worker = get_worker_info()
        place, workers = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        first, stride = self.rank * workers + place, self.world * workers
        for sample, row in zip(count(first, stride), self.stream):
            _need_columns(row, self.image_column, self.label_column)
            try:
                image = decode_image(row[self.image_column], f"image {sample} of {self.name}")
            except CorruptImageError:
                if not self.skip_corrupt:
                    raise
                self.skipped += 1
                continue
            yield _item(image, _label(row[self.label_column]), sample, self.transform, self.class_names)

    def share(self, rank: int, world: int) -> StreamedImages:
        """What one of several processes reads; no image goes to two of them.

        Where the number of shards is a multiple of `world`, a process opens its own shards only; else all read all
        rows and each decodes its own.
        """
        import datasets.distributed

        mine = copy.copy(self)
        mine.rank, mine.world = rank, world
        if world > 1 and isinstance(self.stream, datasets.IterableDataset):
            mine.stream = datasets.distributed.split_dataset_by_node(self.stream, rank, world)
        elif world > 1:
            mine.stream = list(self.stream)[rank::world]
        return mine

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle a stream that shuffles, as `Trainer` asks at each epoch."""
        if hasattr(self.stream, "set_epoch"):
            self.stream.set_epoch(epoch)


def load_labelled_images(
    name_or_path: str | Path,
    split: str,
    transform: PixelTransform,
    *,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str = "label",
    class_names: Sequence[str] | None = None,
    streaming: bool = False,
    skip_corrupt: bool = False,
    shuffle_seed: int | None = None,
    revision: str | None = None,
    only_split: bool = False,
) -> LabelledImages | StreamedImages:
    """Load a local image folder, a saved `datasets` folder, or a dataset of the Hub or a folder laid out like one.

    Args:
        name_or_path: An image folder (`read_folder`), a folder of `Dataset.save_to_disk`, a folder of Parquet, Arrow
            or WebDataset files, or a dataset name.
        split: Such as "train".
        transform: Fits each image to the tower.
        config_name: Configuration of a Hub dataset.
        image_column: Column that holds the image; by default the one of images, or one of `IMAGE_COLUMNS`.
        label_column: Column that holds the label.
        class_names: Names in the order of the labels; by default those of the dataset's label feature.
        streaming: Read a Hub dataset row by row without downloading it.
        skip_corrupt: Leave unreadable images out of a stream.
        shuffle_seed: Shuffle a stream through a buffer of 10,000 rows, anew at each epoch; None keeps its order.
        revision: Branch, tag or commit on the Hub.
        only_split: Download and prepare the files of this split alone; `datasets` does all splits otherwise.

    Raises:
        ValueError: If a folder holds no images, the split or a column does not exist, there are no class names, or
            they do not match the labels.
    """
    import datasets

    path, ids = Path(name_or_path), None
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        # A folder of one split holds no other: it would be train, validation and test at once.
        parts = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        rows = _pick_split(parts, split, str(path))
    elif path.is_dir() and (split_folder(path, split) or not holds(path, DATA_SUFFIXES)):
        rows, ids = read_folder(path, split)
    elif path.is_file() or (not path.is_dir() and (path.is_absolute() or ".." in path.parts or len(path.parts) > 2)):
        raise ValueError(f"{name_or_path} is no folder; wanted one, or the name of a dataset on the Hub.")
    else:
        try:
            rows = _load_dataset(str(name_or_path), config_name, split, streaming, revision, only_split)
        except OSError as error:
            raise ValueError(
                f"{name_or_path} is neither a folder nor a dataset of the Hub that can be read: {error}"
            ) from error
    columns = rows.column_names or []
    image_column = image_column or _image_column(columns, rows.features or {})
    if columns:
        _need_columns(columns, image_column, label_column)
    own_names = getattr((rows.features or {}).get(label_column), "names", None)
    names = class_names or own_names
    if not names:
        raise ValueError(
            f"{name_or_path}: column {label_column!r} carries no class names; pass class_names (--class_names FILE)."
        )
    if own_names and len(own_names) != len(names):
        raise ValueError(
            f"got {len(names)} class names, but {name_or_path} ({split}) has {len(own_names)} classes: "
            f"{list(own_names)[:5]}..."
        )
    name = os.path.basename(os.path.abspath(path)) if path.is_dir() else str(name_or_path)
    shared: dict[str, Any] = {"name": name, "split": split}
    columns_used: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    if isinstance(rows, datasets.IterableDataset):
        rows = rows if shuffle_seed is None else rows.shuffle(seed=shuffle_seed, buffer_size=10_000)
        return StreamedImages(rows, names, transform, **shared, **columns_used, skip_corrupt=skip_corrupt)
    loaded_images = LabelledImages(rows, names, transform, **shared, **columns_used, ids=ids)
    loaded_images.check_labels()
    return loaded_images


def _load_dataset(
    name: str, config: str | None, split: str, streaming: bool, revision: str | None, only_split: bool
) -> Any:
    import datasets

    settings: dict[str, Any] = {}
    whole = split.split("[")[0]  # of "validation[:1000]"
    if only_split and not streaming and "+" not in split:
        builder = datasets.load_dataset_builder(name, config, revision=revision)
        # There are none where a cache is read offline.
        files = {str(key): value for key, value in (builder.config.data_files or {}).items()}
        if files:
            settings = {
                "data_files": {whole: list(_pick_split(files, whole, name))},
                "features": builder.info.features,
            }
            settings["verification_mode"] = "no_checks"  # which would miss the other splits
    rows = datasets.load_dataset(name, config, split=split, streaming=streaming, revision=revision, **settings)
    if Path(name).is_dir() and rows.info.builder_name == "imagefolder":  # it guesses splits from names of classes
        raise ValueError(f"{name} holds images beside {', '.join(DATA_SUFFIXES)} files: move one kind elsewhere.")
    return rows


def _image_column(columns: Sequence[str], features: Mapping[str, Any]) -> str:
    import datasets

    if IMAGE_COLUMNS[0] in columns:
        return IMAGE_COLUMNS[0]
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) == 1:
        return images[0]
    found = next((name for name in IMAGE_COLUMNS if name in (images or columns)), None)
    if found is None and columns:
        raise ValueError(
            f"the dataset has {len(images)} columns of images among {sorted(columns)}; name the one (--image_column)."
        )
    return found or IMAGE_COLUMNS[0]


def _pick_split(splits: Mapping[str, Any], split: str, name: str) -> Any:
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {sorted(splits)}.")
    return splits[split]


def _item(image: Tensor, label: int, sample: int, transform: PixelTransform, names: Sequence[str]) -> dict[str, Any]:
    if not 0 <= label < len(names):
        _check_labels({label}, names)
    return {"images": transform.fit(image[None])[0], "labels": label, "ids": sample}


def _label(value: Any) -> int:
    try:
        return operator.index(value)  # `int` would make 1 of 1.7
    except TypeError as error:
        raise ValueError(
            f"label {value!r} is no whole number; labels are places in the list of class names "
            "(datasets: rows.class_encode_column of texts, rows.cast_column to int64 of floats)."
        ) from error


def _need_columns(columns: Any, *wanted: str) -> None:
    missing = [column for column in wanted if column not in columns]
    if missing:
        raise ValueError(
            f"the dataset has no column {missing[0]!r}, only {sorted(columns)}; set image_column and label_column."
        )


def _check_labels(labels: set[int], class_names: Sequence[str]) -> None:
    stray = sorted(label for label in labels if not 0 <= label < len(class_names))
    if stray:
        raise ValueError(
            f"labels {stray[:5]} have no class name: there are {len(class_names)} names, for labels 0 to "
            f"{len(class_names) - 1}. The names must stand in the order of the labels."
        )
