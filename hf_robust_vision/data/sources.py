"""Where labelled images come from: image folders, saved `datasets` folders, and the Hub or folders laid out like it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_robust_vision.pixels import PixelTransform

from .datasets import LabelledImages, StreamedImages, need_columns
from .folders import DATA_SUFFIXES, read_folder, read_images
from .templates import without_wordnet_ids


# What an image column is called where nothing else tells it apart, in the order in which it is looked for.
IMAGE_COLUMNS = ("image", "webp", "jpg", "jpeg", "png")


@dataclass(frozen=True)
class ImageSource:
    """A set of labelled images before it is opened.

    Args:
        path: An image folder (`read_folder`), a folder of `Dataset.save_to_disk`, a folder of Parquet, Arrow or
            WebDataset files, or the name of a dataset on the Hub.
        config: Configuration of a Hub dataset.
        revision: Branch, tag or commit on the Hub.
        image_column: By default the one of images, or one of `IMAGE_COLUMNS`.
        label_column: Column of whole numbers; None for images without labels, which may lie in any folders.
        class_names: Names in the order of the labels; by default those of the label column, OpenAI's for WordNet ids.
    """

    path: str | Path
    config: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = "label"
    class_names: Sequence[str] | None = None


def load_labelled_images(
    source: ImageSource | str | Path, split: str, transform: PixelTransform, *, only_split: bool = False
) -> LabelledImages:
    """Load a local image folder, a saved `datasets` folder, or a dataset of the Hub or a folder laid out like one.

    A path or name stands for a source with nothing else said; `transform` fits each image to the tower. With `only_split`
    the files of this split alone are downloaded and prepared; `datasets` does all splits otherwise.

    Raises:
        ValueError: If a folder holds no images, the split or a column does not exist, there are no class names, or
            they do not match the labels.
    """
    source = source if isinstance(source, ImageSource) else ImageSource(source)
    rows, places = _open(source, split, only_split=only_split)
    images = LabelledImages(rows, transform=transform, **_described(source, split, rows))
    if not Path(source.path).exists() and str(source.path).count("/") == 1:
        images.hub_id = str(source.path)
    images = images if places is None else images.select(places)
    images.check_labels()
    return images


def stream_images(source: ImageSource, split: str, transform: PixelTransform) -> StreamedImages:
    """Read a dataset row by row, one of the Hub without downloading it."""
    import datasets

    rows, _ = _open(source, split, streaming=True)
    if not isinstance(rows, datasets.IterableDataset):
        raise ValueError(f"{source.path} lies here as single images or a saved dataset; leave --streaming out.")
    return StreamedImages(rows, transform=transform, **_described(source, split, rows))


def _open(source: ImageSource, split: str, **how: bool) -> tuple[Any, list[int] | None]:
    """Rows, and the places of those that belong to the split; None for all."""
    import datasets

    path = Path(source.path)
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        loaded = datasets.load_from_disk(str(path))
        # A folder of one split holds no other: it would be train, validation and test at once.
        parts = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
        return _pick_split(parts, split, str(path)), None
    if path.is_dir() and source.label_column is None and (images := read_images(path, split)) is not None:
        return images, None
    if path.is_dir() and source.label_column is not None and (found := read_folder(path, split)) is not None:
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
    # Of a folder, "Downloading data" and "Generating split" would confuse; of the Hub they are told.
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not local or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _described(source: ImageSource, split: str, rows: Any) -> dict[str, Any]:
    """Class names, name, split and columns of what was opened."""
    known, features = rows.column_names or [], rows.features or {}
    columns = (source.image_column or _image_column(known, features), source.label_column)
    if known:  # a stream may not know its own
        need_columns(known, *columns)
    path = Path(source.path)
    name = os.path.basename(os.path.abspath(path)) if path.is_dir() else str(path)
    about = {"class_names": (), "name": name, "split": split, "columns": columns}
    if source.label_column is None:
        return about
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
    return about | {"class_names": names}


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
