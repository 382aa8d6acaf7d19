"""The data of a comparison that fine-tunes on one data set and measures others, and its classes that a choice holds out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pretrain_photo_clip import hold_out

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.sources import ImageSource, load_labelled_images
from hf_robust_vision.data.splits import relabel
from hf_robust_vision.data.templates import read_class_names
from hf_robust_vision.pixels import PixelTransform


@dataclass(frozen=True)
class DataSet:
    """Images with labels.

    Args:
        name: For tables.
        dataset: Folder, or name of the Hub.
        split: Of it.
        resolution: Side of the square images that are attacked; they are fitted to the tower inside the attacked
            function. Default: the tower's.
        image_column: As of `ImageSource`, as are `label_column`, `config` and `revision`.
        class_names: A list by name, or a file of names; default: those of the data set.
        terms: On which it may be used, for the page.
        folder: That `dataset` lies in, if it is no name of the Hub.
    """

    name: str
    dataset: str
    split: str = "test"
    resolution: int | None = None
    image_column: str | None = None
    label_column: str = "label"
    config: str | None = None
    revision: str | None = None
    class_names: str | None = None
    terms: str = ""
    folder: str = ""

    def load(self, transform: PixelTransform) -> LabelledImages:
        """The images, under the name of the table."""
        if self.resolution is not None:
            square = (self.resolution, self.resolution)
            transform = replace(transform, resize=square, crop=square)
        names = None if self.class_names is None else read_class_names(self.class_names)
        columns = {"image_column": self.image_column, "label_column": self.label_column, "class_names": names}
        path = Path(self.folder) / self.dataset if self.folder else self.dataset
        source = ImageSource(path, config=self.config, revision=self.revision, **columns)
        images = load_labelled_images(source, self.split, transform)
        images.name = self.name
        return images

    def below(self, folder: Path | None) -> DataSet:
        """The same in a folder that holds many."""
        return self if folder is None else replace(self, folder=str(folder))


@dataclass(frozen=True)
class Unseen:
    """Classes that a choice holds out of fine-tuning: what is chosen is to be good at classes and photos of other sets.

    Args:
        share: Of the classes, above 0 and below 1; which they are hangs on their number alone.
        resolution: At which photos of these classes are attacked once more, since another set may be of smaller ones.
        beside: Keys of rows that are not ours and are measured with ours, at what was chosen for them.
    """

    share: float
    resolution: int | None = None
    beside: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"choice: unseen: share must lie between 0 and 1, got {self.share}.")

    def split(self, class_names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Names that fine-tuning sees, and those that it does not."""
        order = torch.randperm(len(class_names), generator=torch.Generator().manual_seed(0)).tolist()
        held = set(order[: max(1, int(self.share * len(order)))])
        names = list(enumerate(class_names))
        return [name for place, name in names if place not in held], [name for place, name in names if place in held]


@dataclass(frozen=True)
class Transfer:
    """A benchmark, as `compare_run.Data`: one data set is trained on, some are measured.

    Args:
        checkpoint: The CLIP that every method starts from, a folder or a name of the Hub.
        templates: Of the prompts, by name.
        attack_eps: Radius of the attack in fine-tuning.
        train: What is fine-tuned on, but for the part that choices are made on.
        validation_share: Size of that part.
        sets: What is measured.
        unseen: Classes of the training set that fine-tuning is not to see, while something is chosen.
    """

    checkpoint: str
    templates: str
    attack_eps: float
    train: DataSet
    validation_share: float
    sets: tuple[DataSet, ...]
    marks: tuple[str, ...]  # of what lies in folders
    unseen: Unseen | None = None

    @property
    def identity(self) -> list[str]:
        """Contents of the folders, wherever they lie; what comes from the Hub is taken at its name and revision."""
        sets = [repr(replace(each, folder="")) for each in (self.train, *self.sets)]
        held_out = [repr(self.unseen.share)] if self.unseen else []
        return [*self.marks, repr(self.validation_share), *sets, *held_out]

    def _parts(self, transform: PixelTransform) -> tuple[LabelledImages, LabelledImages]:
        images = self.train.load(transform)
        ((rest,), (held,)) = hold_out([torch.arange(len(images))], 0, self.validation_share)
        return images.select(rest.sort().values.tolist()), images.select(held.sort().values.tolist(), "validation")

    def training_images(self, transform: PixelTransform) -> LabelledImages:
        """The training split without the validation photos, and without the classes that are held out."""
        images = self._parts(transform)[0]
        return relabel(images, self.unseen.split(images.class_names)[0]) if self.unseen else images

    def measured(self, split: str, transform: PixelTransform) -> dict[str, LabelledImages]:
        """For "validation" the held-out photos of the training split, else all measured sets.

        Where classes are held out, the photos of the other classes and theirs, each among the names of its own part.
        """
        if split != "validation":
            return {each.name: each.load(transform) for each in self.sets}
        photos = self._parts(transform)[1]
        if self.unseen is None:
            return {self.train.name: photos}
        seen, unseen = self.unseen.split(photos.class_names)
        parts = {"seen classes": relabel(photos, seen), "unseen classes": relabel(photos, unseen)}
        if self.unseen.resolution:
            small = replace(self, train=replace(self.train, resolution=self.unseen.resolution))
            parts[f"unseen classes at {self.unseen.resolution} px"] = relabel(small._parts(transform)[1], unseen)
        return parts
