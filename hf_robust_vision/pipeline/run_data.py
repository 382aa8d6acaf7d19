"""The data of a training run: which splits there are, and that no image is in two of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from hf_robust_vision.data.datasets import LabelledImages, StreamedImages
from hf_robust_vision.data.demo import DEMO_NAME, load_demo, refuse_ignored
from hf_robust_vision.data.folders import is_unsplit
from hf_robust_vision.data.sources import ImageSource, load_labelled_images, stream_images
from hf_robust_vision.data.splits import check_disjoint, seeded_subset, split_off, without_corrupt
from hf_robust_vision.data.templates import read_class_names
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.processes import rank_and_world


# Above this many images a full decode before training would take longer than it saves: they are then decoded, and
# a broken one is named, as they come.
SCAN_LIMIT = 50_000


_OF_A_DATASET = (
    *("dataset_config", "train_split", "validation_split", "validation_size", "test_split"),
    *("image_column", "label_column", "class_names", "streaming"),
)


@dataclass
class DataArguments:
    """What to fine-tune and to measure on.

    A folder `<class>/<image>` without splits is divided into train, validation and test (`read_folder`).
    """

    dataset_name: str | None = field(
        default=None, metadata={"help": "Dataset or folder; default: the demo.", "aliases": ["--dataset"]}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_split: str = field(default="train", metadata={"help": "Split to fine-tune on."})
    validation_split: str | None = field(
        default=None, metadata={"help": "Split that every choice is made on; default: drawn from train_split."}
    )
    validation_size: int = field(default=1000, metadata={"help": "Images drawn for validation where it has no split."})
    test_split: str = field(default="test", metadata={"help": "Split of the reported numbers."})
    image_column: str | None = field(default=None, metadata={"help": "Column of the image; default: found."})
    label_column: str = field(default="label", metadata={"help": "Column of the label."})
    class_names: str | None = field(
        default=None,
        metadata={"help": "File of class names in label order, or openai-imagenet; default: the dataset's."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Stream the training split of a Hub dataset; needs validation_split."}
    )
    skip_corrupt: bool = field(default=False, metadata={"help": "Count and leave out broken images."})
    max_validation_samples: int | None = field(
        default=None, metadata={"help": "Seeded subset of the validation split; default: all of it."}
    )
    max_test_samples: int = field(
        default=500, metadata={"help": "Seeded subset of the test split; 0: all of it, which may take days."}
    )

    def __post_init__(self) -> None:
        for name in ("validation_size", "max_validation_samples", "max_test_samples"):
            value, least = getattr(self, name), 0 if name == "max_test_samples" else 1
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")


def load_splits(
    options: DataArguments, seed: int, transform: PixelTransform, *, measure: bool = True
) -> tuple[LabelledImages | StreamedImages, LabelledImages, LabelledImages | None]:
    """Train, validation and test: disjoint, seeded, and readable to the last image.

    `seed` draws what validation is given of the training split, and orders a stream. Without `measure` the test split is
    not opened, and None.

    Raises:
        ValueError: If a split is missing, shares images with another, or holds a broken image.
    """
    source = _source(options)
    # Of the demo, and of a folder without splits, the data room draws all three.
    drawn = source is None or is_unsplit(Path(source.path))
    validation_split = options.validation_split or ("validation" if drawn else None)
    named = [options.train_split, validation_split, *([options.test_split] if measure else [])]
    if len(set(named)) < len(named):
        raise ValueError(
            f"train_split, validation_split and test_split must differ, got {named}; a number measured on a training "
            "image says nothing."
        )
    if options.streaming and validation_split is None:
        raise ValueError("a streamed training split can not give up images: name a --validation_split.")

    def load(split: str) -> LabelledImages:
        if source is None:
            return load_demo(split, transform)
        return load_labelled_images(source, split, transform, only_split=options.streaming)

    test = load(options.test_split) if measure else None
    train: LabelledImages | StreamedImages
    if source is not None and options.streaming:
        train = stream_images(source, options.train_split, transform).shuffled(seed)
        train = train.without_corrupt() if options.skip_corrupt else train
    else:
        train = load(options.train_split)
    if validation_split is not None:
        validation = load(validation_split)
    else:
        assert isinstance(train, LabelledImages)
        train, validation = split_off(train, options.validation_size, seed=seed, name="validation")
    # A fixed seed: runs of different seeds are compared on the same images.
    validation = seeded_subset(validation, options.max_validation_samples, seed=0)
    if test is not None:
        whole, test = len(test), seeded_subset(test, options.max_test_samples or None, seed=0)
        if len(test) < whole and rank_and_world()[0] == 0:
            print(
                f"measured on {len(test)} of {whole} images of {test.split}; for all: --max_test_samples 0", flush=True
            )
    check_disjoint(*(part for part in (train, validation, test) if isinstance(part, LabelledImages)))
    if isinstance(train, LabelledImages):
        train = _without_broken(train, options.skip_corrupt)
    validation = _without_broken(validation, options.skip_corrupt)
    return train, validation, _without_broken(test, options.skip_corrupt) if test is not None else None


def _source(options: DataArguments) -> ImageSource | None:
    """The dataset that was named; None for the demo."""
    if options.dataset_name is None:
        refuse_ignored(options, *_OF_A_DATASET)
        return None
    names = read_class_names(options.class_names) if options.class_names else None
    columns = {"image_column": options.image_column, "label_column": options.label_column}
    return ImageSource(options.dataset_name, options.dataset_config, class_names=names, **columns)


def _without_broken(part: LabelledImages, skip: bool) -> LabelledImages:
    if part.name == DEMO_NAME or (len(part) > SCAN_LIMIT and not skip):
        return part
    return without_corrupt(part, skip=skip)
