"""Image folders, one folder a class: what a folder holds is what is loaded, or it is refused by name."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from hf_robust_vision.processes import rank_and_world


IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
DATA_SUFFIXES = (".parquet", ".arrow", ".tar")
DRAWN = {"train": 0.8, "validation": 0.1, "test": 0.1}  # of a folder without splits
_VALIDATION = ("validation", "val", "valid")
SPLIT_NAMES = frozenset({"train", *_VALIDATION, "test"})


def read_folder(path: Path, split: str) -> tuple[Any, list[int] | None] | None:
    """Paths and labels of `path/<split>/<class>/<image>`, or of a part of `path/<class>/<image>`.

    A class is the first folder below the split: images of folders inside it belong to it, and a warning counts them.
    A folder is a split if it has the name asked for and holds folders of images; "validation", "val" and "valid" stand
    for one another. Where there are no splits, of each class 80 % serve as "train", 10 % as "validation" and 10 % as
    "test"; the draw hangs on the names of the files alone. "all" gives all of them. Links are followed. Names that
    begin with "." or "__" are passed over, other files that are no images (`IMAGE_SUFFIXES`) with a warning. What can not
    be told apart, divided or found is a ValueError.

    Returns:
        A `datasets.Dataset` of "image" (paths) and "label", in the order of class names and paths, and the places of
        what was drawn for the split, or None for all. None in place of both, where files of `DATA_SUFFIXES` lie
        instead of such a split.
    """
    names = (split, *_VALIDATION) if split in _VALIDATION else (split,)
    folders = _folders(path)
    named = [path / name for name in names if name in folders]
    if (folder := next(filter(_holds_classes, named), None)) is not None:
        _need_no_classes_beside(folder)
        return _read(folder), None
    # Before anything is refused: ImageNet's archives may lie beside its folders, but Parquet files are the data.
    if _holds(path, DATA_SUFFIXES):
        return None
    part = "validation" if split in _VALIDATION else split
    if _is_unsplit(path) and part in (*DRAWN, "all"):
        rows = _read(path)
        return rows, None if part == "all" else _draw(path, rows, part)
    if not folders or (named and set(folders) <= SPLIT_NAMES):
        return _read(named[0] if folders else path), None  # it says what is missing
    raise ValueError(
        f"{path} has no folder {split!r} of class folders, only {folders[:9]}; wanted "
        f"{path}/{split}/<class name>/<image>, or the name of the folder that is meant."
    )


def read_images(path: Path, split: str) -> Any:
    """Paths of all images of `path/<split>`, or of `path` where there is no such folder, in any folders below.

    They are a `datasets.Dataset` of "image"; None where files of `DATA_SUFFIXES` lie there instead.
    """
    import datasets

    folder = path / split if split in _folders(path) else path
    if _holds(folder, DATA_SUFFIXES):
        return None
    found = sorted((file for file in _files(folder) if _suffix(file) in IMAGE_SUFFIXES), key=lambda file: file.path)
    if not found:
        raise ValueError(f"{folder} holds no images.")
    return _rows(folder, datasets.Features({"image": datasets.Value("string")}), found)


def is_unsplit(path: Path) -> bool:
    """Whether it is a folder `<class>/<image>`, whose splits are drawn."""
    return path.is_dir() and _is_unsplit(path) and not _holds(path, DATA_SUFFIXES)


def _is_unsplit(path: Path) -> bool:
    folders = [path / name for name in _folders(path)]
    splits = [folder for folder in folders if folder.name in SPLIT_NAMES]
    # "train" and "test" may be classes as well: they are where they hold images instead of folders of images.
    return any(_holds(folder, deep=False) for folder in folders if folder not in splits) and not any(
        map(_holds_classes, splits)
    )


def _need_no_classes_beside(folder: Path) -> None:
    beside = [name for name in _folders(folder.parent) if name not in SPLIT_NAMES | {folder.name}]
    if classes := [name for name in beside if _holds(folder.parent / name, deep=False)]:
        raise ValueError(
            f"{folder} holds class folders, as a split does, but {classes[:5]} beside it hold images, as classes do. "
            f"Move them out of {folder.parent}, or put all classes into one folder {folder}."
        )


def _read(folder: Path) -> Any:
    import datasets

    wanted = f"wanted {folder}/<class name>/<image>."
    if stray := sorted(file.name for file in _files(folder, deep=False) if _suffix(file) in IMAGE_SUFFIXES):
        raise ValueError(f"{len(stray)} images of {folder} lie in no class folder, such as {stray[0]}; {wanted}")
    images: dict[str, list[os.DirEntry[str]]] = {}
    others: Counter[str] = Counter()
    for name in _folders(folder):
        files = sorted(_files(folder / name), key=lambda file: file.path)
        images[name] = [file for file in files if _suffix(file) in IMAGE_SUFFIXES]
        others.update(_suffix(file) for file in files if _suffix(file) not in IMAGE_SUFFIXES)
    found = [(image, label) for label, own in enumerate(images.values()) for image in own]
    if not found:
        raise ValueError(f"{folder} holds no images; {wanted}")
    if empty := [name for name, own in images.items() if not own]:
        raise ValueError(f"{len(empty)} class folders of {folder} hold no images: {empty[:5]}; fill or remove them.")
    if others:
        warnings.warn(f"{folder}: passed over files that are no images: {dict(others.most_common(5))}", stacklevel=2)
    paths = [image.path for image, _ in found]
    if deep := [path for path in paths if os.path.dirname(os.path.dirname(path)) != str(folder)]:
        warnings.warn(
            f"{len(deep)} of {len(paths)} images of {folder} lie in folders inside a class folder and belong to that "
            f"class, such as {os.path.relpath(deep[0], folder)}.",
            stacklevel=2,
        )
    # Not by `imagefolder`, which guesses splits from names of files and classes, and drops what fits none.
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=list(images))})
    return _rows(folder, features, [image for image, _ in found], label=[label for _, label in found])


def _rows(folder: Path, features: Any, images: list[os.DirEntry[str]], **columns: list[int]) -> Any:
    import datasets

    try:
        rows = datasets.Dataset.from_dict({"image": [image.path for image in images], **columns}, features=features)
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of a file in {folder} is not UTF-8: {error.object!r}; rename it.") from error
    # Records on disk are used again for the same files only, wherever the folder lies.
    states = (f"{os.path.relpath(image.path, folder)} {_state(image)}\n" for image in images)
    rows._fingerprint = hashlib.sha256("".join(states).encode()).hexdigest()[:32]
    return rows


def _draw(path: Path, rows: Any, part: str) -> list[int]:
    """Places of one part of each class."""
    members: dict[int, list[tuple[str, int]]] = {}
    for place, (image, label) in enumerate(zip(rows["image"][:], rows["label"][:])):
        # By a hash of the name and no seed: with more images, few of those that were there change their part.
        key = hashlib.sha256(os.fsencode(os.path.relpath(image, path))).hexdigest()
        members.setdefault(label, []).append((key, place))
    if small := [rows.features["label"].names[label] for label, own in members.items() if len(own) < len(DRAWN)]:
        raise ValueError(
            f"{path} has no splits, and {len(small)} classes have fewer than {len(DRAWN)} images to draw them from: "
            f"{small[:5]}."
        )
    drawn: dict[str, list[int]] = {name: [] for name in DRAWN}
    for own in members.values():
        order = [place for _, place in sorted(own)]
        for name in ("test", "validation"):
            count = max(round(DRAWN[name] * len(own)), 1)
            drawn[name] += order[:count]
            del order[:count]
        drawn["train"] += order
    counts = ", ".join(f"{name} {len(places)}" for name, places in drawn.items())
    if rank_and_world()[0] == 0:  # the same text for each part, so that it is shown once
        warnings.warn(f"{path} has no splits; drawn class by class, alike in all runs: {counts}.", stacklevel=2)
    return sorted(drawn[part])


def _holds_classes(folder: Path) -> bool:
    return any(_holds(folder / name) for name in _folders(folder))


def _holds(folder: Path, suffixes: Collection[str] = IMAGE_SUFFIXES, *, deep: bool = True) -> bool:
    # Ends at the first such file: the folder may hold a million.
    return any(_suffix(file) in suffixes for file in _files(folder, deep=deep))


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(path) if _is_folder(entry))


def _files(folder: Path | str, *, deep: bool = True, above: frozenset[str] = frozenset()) -> Iterator[Any]:
    here = os.path.realpath(folder)
    if here in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in; remove it.")
    for entry in _entries(folder):
        if not _is_folder(entry):
            yield entry
        elif deep:
            yield from _files(entry.path, deep=True, above=above | {here})


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:  # it gives the kind of an entry with its name, without a look at each
        yield from (entry for entry in entries if not entry.name.startswith((".", "__")))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()  # `is_dir` of a link to itself raises


def _suffix(file: os.DirEntry[str]) -> str:
    return os.path.splitext(file.name)[1].lower()


def _state(image: os.DirEntry[str]) -> str:
    try:
        state = image.stat()
    except OSError:  # a link to nothing, which reading it will say
        return ""
    return f"{state.st_size} {state.st_mtime_ns}"
