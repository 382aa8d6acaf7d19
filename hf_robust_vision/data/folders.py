"""Image folders, one folder a class: what a folder holds is what is loaded, or it is refused by name."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any


IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
_VALIDATION = ("validation", "val", "valid")
SPLIT_NAMES = frozenset({"train", *_VALIDATION, "test"})


def read_folder(path: Path, split: str) -> Any:
    """Paths and labels of `path/<split>/<class>/<image>`, or of `path/<class>/<image>`, which is the split "train".

    A class is the first folder below the split: images of folders inside it belong to it, and a warning counts them.
    A folder is a split if it has the name asked for and holds folders of images; "validation", "val" and "valid" stand
    for one another. Links are followed. Names that begin with "." or "__" are passed over, other files that are no
    images (`IMAGE_SUFFIXES`) with a warning.

    Args:
        path: The folder.
        split: Its part.

    Returns:
        A `datasets.Dataset` of "image" (paths) and "label", in the order of class names and paths.

    Raises:
        ValueError: If there is no such split, an image lies in no class folder, a class folder is empty, or splits and
            classes can not be told apart.
    """
    import datasets

    folder = split_folder(path, split) or _folder_of_classes(path, split)
    wanted = f"wanted {folder}/<class name>/<image>."
    if stray := sorted(image.name for image in _images(folder, deep=False)):
        raise ValueError(f"{len(stray)} images of {folder} lie in no class folder, such as {stray[0]}; {wanted}")
    files = {name: sorted(_files(folder / name), key=lambda file: file.path) for name in _folders(folder)}
    found = {name: [file for file in own if _suffix(file) in IMAGE_SUFFIXES] for name, own in files.items()}
    images = list(chain.from_iterable(found.values()))
    if not images:
        raise ValueError(f"{folder} holds no images; {wanted}")
    if empty := [name for name, own in found.items() if not own]:
        raise ValueError(f"{len(empty)} class folders of {folder} hold no images: {empty[:5]}; fill or remove them.")
    others = Counter(map(_suffix, chain.from_iterable(files.values())))
    if others := Counter({suffix: count for suffix, count in others.items() if suffix not in IMAGE_SUFFIXES}):
        warnings.warn(f"{folder}: passed over files that are no images: {dict(others.most_common(5))}", stacklevel=2)
    if deep := [image.path for image in images if os.path.dirname(os.path.dirname(image.path)) != str(folder)]:
        warnings.warn(
            f"{len(deep)} of {len(images)} images of {folder} lie in folders inside a class folder and belong to that "
            f"class, such as {os.path.relpath(deep[0], folder)}.",
            stacklevel=2,
        )
    features = datasets.Features({"image": datasets.Value("string"), "label": datasets.ClassLabel(names=list(found))})
    columns = {
        "image": [image.path for image in images],
        "label": [label for label, own in enumerate(found.values()) for _ in own],
    }
    try:
        rows = datasets.Dataset.from_dict(columns, features=features)
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of a file in {folder} is not UTF-8: {error.object!r}; rename it.") from error
    # Records on disk are used again for the same files only, wherever the folder lies.
    states = (f"{os.path.relpath(image.path, folder)} {_state(image)}\n" for image in images)
    rows._fingerprint = hashlib.sha256("".join(states).encode()).hexdigest()[:32]
    return rows


def split_folder(path: Path, split: str) -> Path | None:
    """The folder of a split, or None where no folder of that name holds folders of images.

    Raises:
        ValueError: If other folders beside it hold images as class folders do.
    """
    folder = _named(path, split)
    if folder is None or not _holds_folders(folder):
        return None
    beside = [path / name for name in _folders(path) if name not in SPLIT_NAMES | {folder.name}]
    if classes := [other.name for other in beside if _some(_images(other, deep=False))]:
        raise ValueError(
            f"{folder} holds class folders, as a split does, but {classes[:5]} beside it hold images, as classes do. "
            f"Move them out of {path}, or put all classes into one folder {path}/{split}."
        )
    return folder


def holds(folder: Path, suffixes: tuple[str, ...]) -> bool:
    """Whether a file with one of the suffixes lies in the folder or below it."""
    return any(_suffix(file) in suffixes for file in _files(folder))


def _folder_of_classes(path: Path, split: str) -> Path:
    """`path` itself, if its folders are classes and no split but "train" is asked for."""
    folders, named = _folders(path), _named(path, split)
    only_splits = bool(folders) and set(folders) <= SPLIT_NAMES
    if named is not None and only_splits:
        return named  # without class folders, which the reader says
    nested = bool(folders) and not any(_some(_images(path / name, deep=False)) for name in folders)
    if split != "train" or only_splits or (nested and any(_holds_folders(path / name) for name in folders)):
        raise ValueError(
            f"{path} has no folder {split!r} of class folders, only {folders[:9]}; wanted "
            f"{path}/{split}/<class name>/<image>, or the name of the folder that is meant."
        )
    return path


def _named(path: Path, split: str) -> Path | None:
    folders = _folders(path)
    names = (split, *(_VALIDATION if split in _VALIDATION else ()))
    return next((path / name for name in names if name in folders), None)


def _holds_folders(folder: Path) -> bool:
    return any(_some(_images(folder / name)) for name in _folders(folder))


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in _entries(path) if _is_folder(entry))


def _images(folder: Path, *, deep: bool = True) -> Iterator[os.DirEntry[str]]:
    return (file for file in _files(folder, deep=deep) if _suffix(file) in IMAGE_SUFFIXES)


def _some(files: Iterator[os.DirEntry[str]]) -> bool:
    return next(files, None) is not None


def _files(
    folder: Path | str, *, deep: bool = True, above: frozenset[str] = frozenset()
) -> Iterator[os.DirEntry[str]]:
    here = os.path.realpath(folder)
    if here in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in; remove it.")
    for entry in _entries(folder):
        if not _is_folder(entry):
            yield entry
        elif deep:
            yield from _files(entry.path, above=above | {here})


def _entries(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
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
