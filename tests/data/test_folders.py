"""Image folders: what lies in them is what is loaded (findings-scale 1 and 2)."""

from __future__ import annotations

import os
import time
import warnings
from dataclasses import replace

import datasets
import pytest

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.folders import read_folder
from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.pipeline.measure import EvaluationSet
from hf_robust_vision.pipeline.run_data import DataArguments, load_splits
from hf_robust_vision.pixels import PixelTransform
from tests.conftest import SIZE, picture


FIT = PixelTransform(SIZE, (SIZE, SIZE))


def fill(folder, *names):
    """Files that hold a picture, or nothing where the name is none of an image."""
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(place, place % 3).save(folder / name, "png") if "." in name else (folder / name).mkdir()
    return folder


def loaded(folder, split):
    """Class name and path below the folder of every image, as loaded."""
    part = load_labelled_images(folder, split, FIT)
    paths = [part.rows[place]["image"]["path"] for place in part.ids]
    assert [item["labels"] for item in part] == part.labels()
    return [(part.class_names[label], os.path.relpath(path, folder)) for label, path in zip(part.labels(), paths)]


def names_below(folder):
    return {name for _, _, files in os.walk(folder, followlinks=True) for name in files}


class TestLayouts:
    def test_class_names_that_datasets_takes_for_splits(self, tmp_path):
        """findings-scale 1: two of these six classes were loaded, without a word."""
        classes = ["abbey", "airport", "beach", "train_interior", "train_station", "zoo"]
        fill(tmp_path / "train", *(f"{name}/{place}.jpg" for name in classes for place in range(3)))
        got = loaded(tmp_path, "train")
        assert got == [(name, f"train/{name}/{place}.jpg") for name in classes for place in range(3)]

    def test_imagenet(self, tmp_path):
        """findings-scale 1: `val/<wnid>/ILSVRC2012_val_*.JPEG` gave 'Unknown split "train"'."""
        fill(tmp_path, "train/n01440764/n01440764_18.JPEG", "train/n01443537/n01443537_2.JPEG")
        fill(tmp_path, "val/n01440764/ILSVRC2012_val_00000293.JPEG", "val/n01443537/ILSVRC2012_val_00000236.JPEG")
        fill(tmp_path, "test/ILSVRC2012_test_00000001.JPEG")
        (tmp_path / "ILSVRC2012_devkit_t12.tar").write_bytes(b"archive")
        wanted = [
            ("tench", "val/n01440764/ILSVRC2012_val_00000293.JPEG"),
            ("goldfish", "val/n01443537/ILSVRC2012_val_00000236.JPEG"),
        ]
        assert loaded(tmp_path, "val") == loaded(tmp_path, "validation") == wanted
        assert len(loaded(tmp_path, "train")) == 2

    def test_the_name_asked_for_comes_before_its_synonyms(self, tmp_path):
        fill(tmp_path, "val/a/1.png", "val/b/2.png", "validation/a/3.png", "validation/b/4.png", "valid/a/5.png")
        assert [path for _, path in loaded(tmp_path, "validation")] == ["validation/a/3.png", "validation/b/4.png"]
        assert [path for _, path in loaded(tmp_path, "val")] == ["val/a/1.png", "val/b/2.png"]

    def test_any_other_name_is_a_split_if_it_is_asked_for(self, tmp_path):
        fill(tmp_path, "train/a/1.png", "train/b/2.png", "sketches/a/3.png", "sketches/b/4.png")
        assert len(loaded(tmp_path, "sketches")) == 2

    def test_classes_named_like_splits(self, tmp_path):
        fill(tmp_path, "test/1.png", "train_station/2.png", "train/3.png", "cat/4.png")
        assert [name for name, _ in loaded(tmp_path, "all")] == ["cat", "test", "train", "train_station"]

    def test_suffixes_of_any_case_and_hidden_files(self, tmp_path):
        fill(tmp_path, "a/1.JPG", "a/2.Tiff", "b/3.WEBP", "b/.4.png", ".cache/5.png", "__MACOSX/6.png")
        assert [path for _, path in loaded(tmp_path, "all")] == ["a/1.JPG", "a/2.Tiff", "b/3.WEBP"]

    def test_links(self, tmp_path):
        """findings-scale 1: linked class folders gave "holds no images"."""
        fill(tmp_path / "store", "a/1.png", "b/2.png", "3.png")
        (tmp_path / "data" / "train" / "c").mkdir(parents=True)
        for name in "ab":
            (tmp_path / "data" / "train" / name).symlink_to(tmp_path / "store" / name)
        (tmp_path / "data" / "train" / "c" / "3.png").symlink_to(tmp_path / "store" / "3.png")
        assert [path for _, path in loaded(tmp_path / "data", "train")] == [
            f"train/{n}.png" for n in ("a/1", "b/2", "c/3")
        ]
        (tmp_path / "all").symlink_to(tmp_path / "data")
        assert len(loaded(tmp_path / "all", "train")) == 3

    @pytest.mark.parametrize("link", ["a/again", "again"])
    def test_a_link_to_a_folder_above(self, link, tmp_path):
        fill(tmp_path / "train", "a/1.png", "b/2.png")
        (tmp_path / "train" / link).symlink_to(tmp_path / "train")
        with pytest.raises(ValueError, match=r"again.* is a link to a folder that it lies in"):
            read_folder(tmp_path, "train")

    @pytest.mark.parametrize("target", ["nowhere.png", "2.png"], ids=["to nothing", "to itself"])
    def test_a_broken_link_is_a_broken_image(self, target, tmp_path):
        fill(tmp_path / "train", "a/1.png", "b/3.png")
        (tmp_path / "train" / "b" / "2.png").symlink_to(target)
        part = load_labelled_images(tmp_path, "train", FIT)
        assert part.corrupt() == [1]

    def test_folders_inside_a_class_folder(self, tmp_path):
        fill(tmp_path / "train", "a/1.png", "a/deep/er/2.png", "b/3/3.png")
        with pytest.warns(UserWarning, match=r"2 of 3 images .* such as a/deep/er/2\.png"):
            got = loaded(tmp_path, "train")
        assert [name for name, _ in got] == ["a", "a", "b"]

    def test_other_files_are_counted(self, tmp_path):
        fill(tmp_path / "train", "a/1.png", "a/2.heic", "a/3.txt", "b/4.png", "b/5.heic")
        (tmp_path / "train" / "list.txt").write_text("beside the classes, as lists of files are")
        with pytest.warns(UserWarning, match=r"that are no images: \{'\.heic': 2, '\.txt': 1\}"):
            assert len(loaded(tmp_path, "train")) == 2


class TestWithoutSplits:
    """findings-journey 4: a folder `<class>/<image>` is divided here, not by hand."""

    SIZES = (("a", 40), ("b", 11), ("c", 3))

    @pytest.fixture
    def folder(self, tmp_path):
        return fill(tmp_path / "d", *(f"{name}/{n}.png" for name, size in self.SIZES for n in range(size)))

    @pytest.mark.filterwarnings("ignore:.*has no splits")
    def test_each_class_is_divided(self, folder):
        parts = {split: loaded(folder, split) for split in ("train", "validation", "test", "all")}
        images = [image for split in ("train", "validation", "test") for image in parts[split]]
        assert sorted(images) == sorted(parts["all"])
        counts = {split: [[name for name, _ in part].count(name) for name in "abc"] for split, part in parts.items()}
        assert counts == {"train": [32, 9, 1], "validation": [4, 1, 1], "test": [4, 1, 1], "all": [40, 11, 3]}
        assert loaded(folder, "val") == parts["validation"]

    def test_it_is_said_once(self, folder):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("default")
            for split in ("train", "validation", "test"):
                load_labelled_images(folder, split, FIT)
        (line,) = [str(warning.message) for warning in said]
        assert (
            line == f"{folder} has no splits; drawn class by class, alike in all runs: train 42, validation 6, test 6."
        )

    @pytest.mark.filterwarnings("ignore:.*has no splits")
    def test_the_draw_hangs_on_the_names_of_the_files(self, folder, tmp_path):
        before = loaded(folder, "test")
        folder.rename(tmp_path / "moved")
        assert loaded(tmp_path / "moved", "test") == before
        fill(tmp_path / "moved", *(f"a/new {n}.png" for n in range(10)))
        assert len(set(before) & set(loaded(tmp_path / "moved", "test"))) >= 4

    @pytest.mark.filterwarnings("ignore:.*has no splits")
    def test_of_a_run(self, folder):
        """Its name is enough, and no image is in two parts."""
        options = DataArguments(dataset_name=str(folder))
        train, validation, test = load_splits(options, 0, FIT)
        assert [len(part) for part in (train, validation, test)] == [42, 6, 6]
        assert sorted([*train.ids, *validation.ids, *test.ids]) == list(range(54))
        with pytest.raises(ValueError, match="validation and val of d share 6 images"):
            load_splits(replace(options, test_split="val"), 0, FIT)
        with pytest.raises(ValueError, match="all and validation of d share 6 images"):
            load_splits(replace(options, train_split="all"), 0, FIT)

    @pytest.mark.filterwarnings("ignore:.*has no splits")
    def test_of_an_evaluation(self, folder):
        assert len(EvaluationSet(str(folder)).load(FIT)[0]) == 6
        assert len(EvaluationSet(str(folder), split="all").load(FIT)[0]) == 54

    def test_too_few_images(self, folder):
        (folder / "c" / "0.png").unlink()
        with pytest.raises(ValueError, match=r"1 classes have fewer than 3 images to draw them from: \['c'\]"):
            load_labelled_images(folder, "test", FIT)


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        (["train/a/1.png", "train/b/2.png", "train/3.png"], "train", r"1 images .*no class folder, such as 3\.png"),
        (["val/1.JPEG", "val/2.JPEG", "train/a/3.png"], "validation", r"2 images of .*val lie in no class folder"),
        (["a/1.png", "b/2.png", "3.png"], "train", r"1 images of .* no class folder, such as 3\.png"),
        (["train/a/1.png", "train/b/2.png", "train/c"], "train", r"1 class folders .* hold no images: \['c'\]"),
        (["train/a/1.png", "train/b/2.png", "train/c/x.txt"], "train", r"hold no images: \['c'\]"),
        (["train/a/1.png", "train/b/2.png"], "test", r"no folder 'test' of class folders, only \['train'\]"),
        (["test/a/1.png", "test/b/2.png"], "train", r"no folder 'train' .*only \['test'\]"),
        (["test/1.png", "val/2.png"], "train", r"no folder 'train' .*only \['test', 'val'\]"),
        (["Training/a/1.png", "Testing/a/2.png"], "train", r"no folder 'train' .*\['Testing', 'Training'\]"),
        (
            ["train/a/1.png", "train/b/2.png", "station/3.png"],
            "train",
            r"train holds class folders.*\['station'\] beside",
        ),
        (["a/1.png", "b/2.png"], "extra", r"no folder 'extra' of class folders, only \['a', 'b'\]"),
        (["train/a/1.png", "train/b/2.png"], "train/a", "no folder 'train/a'"),
        (["train/a/1.png", "train/b/2.png"], "..", r"no folder '\.\.'"),
        (["train/a/1.png", "train/b/2.png"], "", "no folder ''"),
    ],
)
def test_what_is_refused(names, split, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        load_labelled_images(fill(tmp_path, *names), split, FIT)


def test_images_beside_an_archive(tmp_path):
    """What `datasets` makes of such a folder is a guess: half the classes here."""
    fill(tmp_path, *(f"{name}/{place}.png" for name in ("abbey", "train_station", "zoo") for place in range(3)))
    (tmp_path / "photos.tar").write_bytes(b"archive")
    with pytest.raises(ValueError, match="holds images beside .*tar files: move one kind elsewhere"):
        load_labelled_images(tmp_path, "train", FIT)


def test_a_name_that_is_not_text(tmp_path):
    fill(tmp_path / "train", "a/1.png", "b/2.png")
    os.link(tmp_path / "train" / "a" / "1.png", os.fsencode(tmp_path / "train" / "a") + b"/caf\xe9.png")
    with pytest.raises(ValueError, match=r"not UTF-8: .*caf.*rename"):
        read_folder(tmp_path, "train")


def test_records_belong_to_the_files(tmp_path):
    """A folder that was moved is the same data; one with a file exchanged is not."""
    fill(tmp_path / "d" / "train", "a/1.png", "b/2.png")
    first = load_labelled_images(tmp_path / "d", "train", FIT).rows._fingerprint
    (tmp_path / "d").rename(tmp_path / "e")
    assert load_labelled_images(tmp_path / "e", "train", FIT).rows._fingerprint == first
    os.utime(tmp_path / "e" / "train" / "a" / "1.png", ns=(1, 1))
    assert load_labelled_images(tmp_path / "e", "train", FIT).rows._fingerprint != first


def test_twenty_thousand_files(tmp_path):
    """findings-scale 2: 50,000 files took 200 s, labels 40 s of 1.28 million."""
    source = fill(tmp_path, "one.png") / "one.png"
    for label in range(100):
        folder = tmp_path / "data" / "train" / f"class {label:03d}"
        folder.mkdir(parents=True)
        for place in range(200):
            os.link(source, folder / f"{place:03d}.png")
    start = time.perf_counter()
    part = load_labelled_images(tmp_path / "data", "train", FIT)
    labels = part.labels()
    assert time.perf_counter() - start < 10
    assert len(part) == len(labels) == 20_000
    assert [labels.count(label) for label in (0, 50, 99)] == [200] * 3
    assert part[19_999]["labels"] == 99


def test_labels_are_read_at_once():
    """findings-scale 2: a look into the table for each label took 40 s at 1.28 million rows."""
    rows = datasets.Dataset.from_dict({"image": ["none"] * 200_000, "label": [0, 1] * 100_000})
    part = LabelledImages(rows, ("a", "b"), FIT, name="x", split="train").select(range(1, 200_000, 2))
    start = time.perf_counter()
    assert part.labels() == [1] * 100_000
    assert time.perf_counter() - start < 1  # one by one: 6 s


def test_nothing_is_said_about_a_folder_in_order(image_folder, capfd):
    """findings-scale 11: no "Generating train split", no "Downloading data"."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert names_below(image_folder / "train") == {
            os.path.basename(path) for _, path in loaded(image_folder, "train")
        }
    assert capfd.readouterr() == ("", "")
