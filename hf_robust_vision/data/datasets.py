"""Labelled images as the rest of the package reads them: float tensors in [0, 1] with a label and a stable id."""

from __future__ import annotations

import copy
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
from .folders import DATA_SUFFIXES, read_folder
from .templates import without_wordnet_ids


# What an image column is called where nothing else tells it apart, in the order in which it is looked for.
IMAGE_COLUMNS = ("image", "webp", "jpg", "jpeg", "png")


class _Labelled:
    """What datasets and streams of labelled images share."""

    new_labels: Mapping[int, int] | None = None  # of the rows' labels; -1 for any other

    def __init__(
        self,
        rows: Any,
        class_names: Sequence[str],
        transform: PixelTransform,
        *,
        name: str,
        split: str,
        columns: tuple[str, str] = ("image", "label"),
    ):
        check_class_names(class_names)
        self.image_column, self.label_column = columns
        self.rows, self.class_names, self.transform = undecoded(rows, columns[0]), tuple(class_names), transform
        self.name, self.split = name, split
        self._prepare()

    def _prepare(self) -> None:
        pass

    def _item(self, row: Mapping[str, Any], sample: int) -> dict[str, Any]:
        image, label = self._decode(row, sample), self._number(row[self.label_column])
        _check_labels({label}, self.class_names)
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


class LabelledImages(_Labelled, Dataset):
    """A map-style dataset of labelled images.

    Each item is `{"images": (3, height, width) in [0, 1], "labels": int, "ids": int}`. The id is the row's place in
    the source, so it names the same image after any selection or shuffle.

    Args:
        rows: Any sequence of mappings with an image and a label, such as a `datasets.Dataset`.
        class_names: Names in the order of the labels.
        transform: Fits each image to the tower.
        name: Of the dataset, for results.
        split: Of the dataset, for results.
        columns: Keys of the image and of the label.

    Raises:
        ValueError: If the dataset is empty, a column is missing, or there are fewer than two classes.
    """

    def _prepare(self) -> None:
        if len(self.rows) == 0:
            raise ValueError(f"{self.name} ({self.split}) holds no images.")
        columns = self.rows.column_names if hasattr(self.rows, "column_names") else self.rows[0]
        _need_columns(columns, self.image_column, self.label_column)
        self.ids = list(range(len(self.rows)))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._item(self.rows[self.ids[index]], self.ids[index])

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
            _need_columns(row, self.image_column, self.label_column)
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
        fine = copy.copy(self)
        fine.skip_corrupt = True
        return fine

    def shuffled(self, seed: int) -> StreamedImages:
        """This stream through a buffer of 10,000 rows, shuffled anew at each epoch."""
        mixed = copy.copy(self)
        mixed.rows = self.rows.shuffle(seed=seed, buffer_size=10_000)
        return mixed

    def share(self, rank: int, world: int) -> StreamedImages:
        """What one of several processes reads; no image goes to two of them.

        Where the number of shards is a multiple of `world`, a process opens its own shards only; else all read all
        rows and each decodes its own.
        """
        import datasets.distributed

        mine = copy.copy(self)
        mine.rank, mine.world = rank, world
        if world > 1 and isinstance(self.rows, datasets.IterableDataset):
            mine.rows = datasets.distributed.split_dataset_by_node(self.rows, rank, world)
        elif world > 1:
            mine.rows = list(self.rows)[rank::world]
        return mine

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle a stream that shuffles, as `Trainer` asks at each epoch."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)


@dataclass(frozen=True)
class ImageSource:
    """A set of labelled images before it is opened.

    Args:
        path: An image folder (`read_folder`), a folder of `Dataset.save_to_disk`, a folder of Parquet, Arrow or
            WebDataset files, or the name of a dataset on the Hub.
        config: Configuration of a Hub dataset.
        revision: Branch, tag or commit on the Hub.
        image_column: By default the one of images, or one of `IMAGE_COLUMNS`.
        label_column: Column of whole numbers.
        class_names: Names in the order of the labels; by default those of the label column, OpenAI's for WordNet ids.
    """

    path: str | Path
    config: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str = "label"
    class_names: Sequence[str] | None = None


def load_labelled_images(
    source: ImageSource | str | Path, split: str, transform: PixelTransform, *, only_split: bool = False
) -> LabelledImages:
    """Load a local image folder, a saved `datasets` folder, or a dataset of the Hub or a folder laid out like one.

    Args:
        source: What to load; a path or name stands for a source with nothing else said.
        split: Such as "train".
        transform: Fits each image to the tower.
        only_split: Download and prepare the files of this split alone; `datasets` does all splits otherwise.

    Raises:
        ValueError: If a folder holds no images, the split or a column does not exist, there are no class names, or
            they do not match the labels.
    """
    source = source if isinstance(source, ImageSource) else ImageSource(source)
    rows, places = _open(source, split, only_split=only_split)
    names, about = _described(source, split, rows)
    images = LabelledImages(rows, names, transform, **about)
    images = images if places is None else images.select(places)
    images.check_labels()
    return images


def stream_images(source: ImageSource, split: str, transform: PixelTransform) -> StreamedImages:
    """Read a dataset row by row, one of the Hub without downloading it.

    Raises:
        ValueError: As `load_labelled_images`, or if `datasets` does not stream what lies there.
    """
    import datasets

    rows, _ = _open(source, split, streaming=True)
    if not isinstance(rows, datasets.IterableDataset):
        raise ValueError(f"{source.path} lies here as single images or a saved dataset; leave --streaming out.")
    names, about = _described(source, split, rows)
    return StreamedImages(rows, names, transform, **about)


def _open(source: ImageSource, split: str, **how: bool) -> tuple[Any, list[int] | None]:
    """Rows, and the places of those that belong to the split; None for all."""
    import datasets

    path = Path(source.path)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        # A folder of one split holds no other: it would be train, validation and test at once.
        parts = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        return _pick_split(parts, split, str(path)), None
    if path.is_dir() and (found := read_folder(path, split)) is not None:
        return found
    if path.is_file() or (not path.is_dir() and (path.is_absolute() or ".." in path.parts or len(path.parts) > 2)):
        raise ValueError(f"{source.path} is no folder; wanted one, or the name of a dataset on the Hub.")
    try:
        with _without_bars(path.is_dir()):
            return _load_dataset(source, split, **how), None
    except OSError as error:
        raise ValueError(
            f"{source.path} is neither a folder nor a dataset of the Hub that can be read: {error}"
        ) from error


def _load_dataset(source: ImageSource, split: str, streaming: bool = False, only_split: bool = False) -> Any:
    import datasets

    name, settings = str(source.path), dict[str, Any](name=source.config, revision=source.revision)
    whole = split.split("[")[0]  # of "validation[:1000]"
    if only_split and "+" not in split:
        builder = datasets.load_dataset_builder(name, **settings)
        # There are none where a cache is read offline.
        if files := {str(key): value for key, value in (builder.config.data_files or {}).items()}:
            settings["data_files"] = {whole: list(_pick_split(files, whole, name))}
            # Told, because they are else guessed from the first rows; and unchecked, because checks miss other splits.
            settings |= {"features": builder.info.features, "verification_mode": "no_checks"}
    rows = datasets.load_dataset(name, split=split, streaming=streaming, **settings)
    if Path(name).is_dir() and rows.info.builder_name == "imagefolder":  # it guesses splits from names of classes
        raise ValueError(f"{name} holds images beside {', '.join(DATA_SUFFIXES)} files: move one kind elsewhere.")
    return rows


@contextmanager
def _without_bars(local: bool) -> Iterator[None]:
    """Of a folder, "Downloading data" and "Generating split" would say what is not so; of the Hub it is told."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not local or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _described(source: ImageSource, split: str, rows: Any) -> tuple[Sequence[str], dict[str, Any]]:
    """Class names, and the name, split and columns of what was opened."""
    columns, features = rows.column_names or [], rows.features or {}
    image_column = source.image_column or _image_column(columns, features)
    if columns:
        _need_columns(columns, image_column, source.label_column)
    own = getattr(features.get(source.label_column), "names", None)
    names = source.class_names or without_wordnet_ids(own or ())
    if not names:
        said = f"{source.path}: column {source.label_column!r} carries no class names"
        raise ValueError(f"{said}; pass class_names (--class_names FILE).")
    if own and len(own) != len(names):
        raise ValueError(
            f"got {len(names)} class names, but {source.path} ({split}) has {len(own)} classes: {list(own)[:5]}...; for "
            "its own names type --class_names ''."
        )
    path = Path(source.path)
    name = os.path.basename(os.path.abspath(path)) if path.is_dir() else str(path)
    return names, {"name": name, "split": split, "columns": (image_column, source.label_column)}


def _image_column(columns: Sequence[str], features: Mapping[str, Any]) -> str:
    import datasets

    if IMAGE_COLUMNS[0] in columns:  # beside it a mask may be the only one that `datasets` calls an image
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
