"""Labelled images: decoding, numbering, labels, folders, streams."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import datasets
import pytest
import torch

from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.datasets import LabelledImages, StreamedImages
from hf_robust_vision.data.decode import CorruptImageError
from hf_robust_vision.data.sources import ImageSource, load_labelled_images, stream_images
from hf_robust_vision.data.splits import only_classes, relabel
from hf_robust_vision.pipeline.run_data import DataArguments, load_splits
from hf_robust_vision.pixels import PixelTransform
from tests.conftest import NAMES, SIZE, make_dataset, picture
from tests.data.test_decode import encoded


FIT = PixelTransform(SIZE, (SIZE, SIZE))


def test_corrupt_file_is_named_and_counted(image_folder, tmp_path):
    good = image_folder / "test" / "red" / "18.png"
    (tmp_path / "test" / "a").mkdir(parents=True)
    (tmp_path / "test" / "b").mkdir()
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "test" / name).write_bytes(good.read_bytes())
    (tmp_path / "test" / "a" / "2.png").write_bytes(good.read_bytes()[:500])
    (tmp_path / "test" / "b" / "4.png").write_bytes(b"")
    part = load_labelled_images(tmp_path, "test", FIT)
    assert [part.rows[i]["image"]["path"].rsplit("/")[-1] for i in part.corrupt()] == ["2.png", "4.png"]
    with pytest.raises(CorruptImageError, match=r"2\.png is corrupt or truncated.*--skip_corrupt"):
        part[part.corrupt()[0]]


def test_folder(image_folder):
    part = load_labelled_images(image_folder, "train", FIT)
    assert part.class_names == tuple(sorted(NAMES))
    assert len(part) == 12
    assert (part.name, part.split) == ("tiny-images", "train")
    item = part[0]
    assert item["images"].shape == (3, SIZE, SIZE)
    assert 0 <= item["images"].min() <= item["images"].max() <= 1
    # An archive that lies about, as ImageNet's does, changes nothing.
    (image_folder / "all.tar").write_bytes(b"archive")
    assert len(load_labelled_images(image_folder, "train", FIT)) == 12
    (image_folder / "all.tar").unlink()
    # The label is that of the folder the file lies in.
    for index in range(12):
        folder = part.rows[index]["image"]["path"].split("/")[-2]
        assert part.class_names[part[index]["labels"]] == folder


@pytest.mark.parametrize(
    ("files", "split", "said"),
    [
        ([], "train", "holds no images; wanted"),
        (["train/notes.txt"], "train", "holds no images; wanted"),
        (["a/1.png", "b/2.png"], "test", "fewer than 3 images"),
        (["train/a/1.png", "train/a/2.png"], "train", "at least 2 classes"),
        (["train/1.png", "train/2.png"], "train", r"2 images of .*train lie in no class folder, such as 1\.png"),
    ],
)
def test_folders_that_are_no_data_set(files, split, said, tmp_path):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(0, 0).save(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=said):
        load_labelled_images(tmp_path, split, FIT)


def rows_of(count, labels=None, **columns):
    values = {"image": [{"bytes": encoded(picture(i, i % 3)), "path": None} for i in range(count)]}
    values["label"] = labels if labels is not None else [i % 3 for i in range(count)]
    return datasets.Dataset.from_dict(values | columns).cast_column("image", datasets.Image())


def saved(rows, folder, names=NAMES):
    if names:
        rows = rows.cast_column("label", datasets.ClassLabel(names=list(names)))
    datasets.DatasetDict({"train": rows}).save_to_disk(str(folder))
    return folder


class TestSavedDatasets:
    """Folders of `save_to_disk`."""

    def test_names_and_ids(self, tmp_path):
        part = load_labelled_images(saved(rows_of(6), tmp_path / "d"), "train", FIT)
        assert part.class_names == NAMES
        assert part.labels() == [0, 1, 2, 0, 1, 2]
        assert [item["ids"] for item in part.select([4, 1])] == [4, 1]

    def test_unknown_split(self, tmp_path):
        with pytest.raises(ValueError, match=r"no split 'test'; it has \['train'\]"):
            load_labelled_images(saved(rows_of(6), tmp_path / "d"), "test", FIT)

    def test_one_split_is_not_every_split(self, tmp_path):
        """A folder of a single `Dataset` must not serve as train and as test."""
        rows_of(6).cast_column("label", datasets.ClassLabel(names=list(NAMES))).save_to_disk(str(tmp_path / "d"))
        assert len(load_labelled_images(tmp_path / "d", "train", FIT)) == 6
        with pytest.raises(ValueError, match="split 'test'"):
            load_labelled_images(tmp_path / "d", "test", FIT)

    @pytest.mark.parametrize("column", ["image_column", "label_column"])
    def test_wrong_column(self, column, tmp_path):
        with pytest.raises(ValueError, match=r"no column 'nope', only \['image', 'label'\]"):
            load_labelled_images(ImageSource(saved(rows_of(6), tmp_path / "d"), **{column: "nope"}), "train", FIT)

    def test_no_class_names(self, tmp_path):
        with pytest.raises(ValueError, match="no class names"):
            load_labelled_images(saved(rows_of(6), tmp_path / "d", names=None), "train", FIT)

    @pytest.mark.parametrize("labels", [[0, 1, 2, 3, 0, 1], [0, 1, -1, 2, 0, 1]])
    def test_labels_without_a_name(self, labels, tmp_path):
        folder = saved(rows_of(6, labels), tmp_path / "d", names=None)
        with pytest.raises(ValueError, match=r"have no class name: there are 3 names"):
            load_labelled_images(ImageSource(folder, class_names=NAMES), "train", FIT)

    @pytest.mark.parametrize("names", [("red", "green"), (*NAMES, "black")])
    def test_other_number_of_names(self, names, tmp_path):
        with pytest.raises(ValueError, match=r"got \d class names, but .* has 3 classes: .*type --class_names ''"):
            load_labelled_images(ImageSource(saved(rows_of(6), tmp_path / "d"), class_names=names), "train", FIT)

    def test_names_that_stand_twice(self, tmp_path):
        folder = saved(rows_of(6), tmp_path / "d", names=None)
        with pytest.warns(UserWarning, match=r"\['red'\] stand more than once: text can not tell"):
            part = load_labelled_images(ImageSource(folder, class_names=("red", "red", "blue")), "train", FIT)
        assert part.labels() == [0, 1, 2, 0, 1, 2]
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough: findings-scale 11
            both = only_classes(part, ["red"])
        assert both.labels() == [0, 1, 0, 1]  # of both classes, not only the first of that name
        with pytest.raises(ValueError, match="need names that differ"):
            relabel(part, ["red", "blue"])

    def test_text_labels(self, tmp_path):
        folder = saved(rows_of(3, ["red", "green", "blue"]), tmp_path / "d", names=None)
        with pytest.raises(ValueError, match=r"label"):
            load_labelled_images(ImageSource(folder, class_names=NAMES), "train", FIT)

    @pytest.mark.parametrize("labels", [[0.0, 1.7, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, math.inf], [0, None, 2]])
    def test_labels_that_are_no_whole_numbers(self, labels, tmp_path):
        """findings-reliability 8: 1.7 was read as 1; inf was a traceback."""
        folder = saved(rows_of(3, labels), tmp_path / "d", names=None)
        with pytest.raises(ValueError, match=r"label .* is no whole number.*cast_column to int64 of floats"):
            load_labelled_images(ImageSource(folder, class_names=NAMES), "train", FIT)

    def test_the_image_column_is_found(self, tmp_path):
        rows = rows_of(6).rename_column("image", "photo").class_encode_column("label")
        datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "d"))
        names = {"class_names": NAMES}
        assert load_labelled_images(ImageSource(tmp_path / "d", **names), "train", FIT).image_column == "photo"
        with pytest.raises(ValueError, match="no column 'image'"):  # one that is named is meant
            load_labelled_images(ImageSource(tmp_path / "d", **names, image_column="image"), "train", FIT)
        two = rows.map(lambda row: {"copy": row["photo"]})
        datasets.DatasetDict({"train": two}).save_to_disk(str(tmp_path / "two"))
        with pytest.raises(ValueError, match=r"2 columns of images.*--image_column"):
            load_labelled_images(ImageSource(tmp_path / "two", **names), "train", FIT)

    def test_a_column_called_image_is_meant(self, tmp_path):
        """Beside it a mask may be the only column that `datasets` calls an image."""
        rows = rows_of(6).class_encode_column("label").map(lambda row: {"mask": row["image"]})
        rows = rows.cast_column("image", {"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
        datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "d"))
        part = load_labelled_images(ImageSource(tmp_path / "d", class_names=NAMES), "train", FIT)
        assert part.image_column == "image"
        assert part[0]["images"].shape == (3, SIZE, SIZE)

    def test_other_columns(self, tmp_path):
        rows = rows_of(6).rename_columns({"image": "img", "label": "fine"})
        rows = rows.cast_column("fine", datasets.ClassLabel(names=list(NAMES)))
        datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "d"))
        part = load_labelled_images(ImageSource(tmp_path / "d", image_column="img", label_column="fine"), "train", FIT)
        assert part[4]["labels"] == 1


class TestHubLayout:
    """A folder laid out as on the Hub: Parquet files of each split."""

    @pytest.fixture
    def folder(self, tmp_path):
        for split, count in (("train", 9), ("validation", 4), ("test", 6)):
            rows = rows_of(count).cast_column("label", datasets.ClassLabel(names=list(NAMES)))
            rows.to_parquet(str(tmp_path / "hub" / "data" / f"{split}-0.parquet"))
        return tmp_path / "hub"

    @pytest.fixture
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        return lambda: sorted({file.stem.split("-")[-1] for file in (tmp_path / "cache").rglob("*.arrow")})

    def test_one_split_alone(self, folder, cache):
        part = load_labelled_images(folder, "test", FIT, only_split=True)
        assert (part.class_names, part.labels(), part.name) == (NAMES, [0, 1, 2, 0, 1, 2], "hub")
        assert cache() == ["test"]
        with pytest.raises(ValueError, match=r"no split 'tset'; it has \['test', 'train', 'validation'\]"):
            load_labelled_images(folder, "tset", FIT, only_split=True)
        assert len(load_labelled_images(folder, "validation[:3]", FIT, only_split=True)) == 3
        assert cache() == ["test", "validation"]

    def test_while_a_stream_trains_no_training_image_is_prepared(self, folder, cache):
        options = DataArguments(dataset_name=str(folder), streaming=True, validation_split="validation")
        train, validation, test = load_splits(options, 0, FIT)
        assert isinstance(train, StreamedImages)
        assert sorted(item["labels"] for item in train) == sorted([0, 1, 2] * 3)
        assert (len(validation), len(test)) == (4, 6)
        assert cache() == ["test", "validation"]
        few = replace(options, max_validation_samples=2, max_test_samples=3)
        assert [len(part) for part in load_splits(few, 0, FIT)[1:]] == [2, 3]

    def test_a_stream_is_left_as_it_lies_or_shuffled(self, folder, cache):
        stream = stream_images(ImageSource(folder), "train", FIT)
        assert [item["labels"] for item in stream] == [0, 1, 2] * 3
        orders = [[item["images"].sum().item() for item in stream.shuffled(seed)] for seed in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2]

    def test_nothing_is_said_of_downloads_that_are_none(self, folder, cache, capfd):
        """findings-scale 11: "Generating train split" and "Downloading data" for a local folder."""
        for only_split in (True, False):
            load_labelled_images(folder, "test", FIT, only_split=only_split)
        assert cache() == ["test", "train", "validation"]
        assert capfd.readouterr().err == ""
        assert not datasets.utils.are_progress_bars_disabled()

    def test_without_a_measurement_no_test_split_is_opened(self, folder, cache):
        options = DataArguments(
            dataset_name=str(folder), streaming=True, validation_split="validation", test_split="validation"
        )
        with pytest.raises(ValueError, match="must differ"):
            load_splits(options, 0, FIT)
        assert load_splits(options, 0, FIT, measure=False)[2] is None
        assert cache() == ["validation"]

    def test_a_stream_needs_a_split_for_validation(self, folder, cache):
        with pytest.raises(ValueError, match="--validation_split"):
            load_splits(DataArguments(dataset_name=str(folder), streaming=True), 0, FIT)
        assert cache() == []


@pytest.mark.parametrize("kind", ["image folder", "saved"])
def test_what_lies_here_is_not_streamed(kind, image_folder, tmp_path):
    """It was loaded whole, and --streaming did nothing."""
    source = ImageSource(image_folder if kind == "image folder" else saved(rows_of(6), tmp_path / "d"))
    with pytest.raises(ValueError, match="leave --streaming out"):
        stream_images(source, "train", FIT)


@pytest.mark.parametrize("name", ["{tmp}/nothing", "../nothing", "a/b/c", "{tmp}/file.zip"])
def test_a_path_is_no_name_of_the_hub(name, tmp_path):
    """findings-journey 8: a mistyped path went to the Hub and was tried five times."""
    (tmp_path / "file.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is no folder; wanted one, or the name of a dataset on the Hub"):
        load_labelled_images(name.format(tmp=tmp_path), "train", FIT)


def test_the_folder_that_one_is_in_has_a_name(image_folder, monkeypatch):
    monkeypatch.chdir(image_folder)
    assert load_labelled_images(".", "train", FIT).name == "tiny-images"


@pytest.mark.parametrize("given", [{"class_names": "x.txt"}, {"test_split": "train"}, {"validation_size": 5}])
def test_settings_that_the_demo_would_not_heed(given):
    """findings-reliability 8"""
    with pytest.raises(ValueError, match=f"{next(iter(given))}: settings of a dataset, but none is named"):
        load_splits(DataArguments(**given), 0, FIT)


class TestLabelledImages:
    def test_empty(self):
        with pytest.raises(ValueError, match="holds no images"):
            LabelledImages([], NAMES, FIT, name="x", split="train")

    def test_one_class(self):
        with pytest.raises(ValueError, match="at least 2 classes"):
            LabelledImages([{"image": picture(0, 0), "label": 0}], ["red"], FIT, name="x", split="train")

    def test_wrong_column(self):
        with pytest.raises(ValueError, match="no column 'label'"):
            LabelledImages([{"image": picture(0, 0), "class": 0}], NAMES, FIT, name="x", split="train")

    def test_ids_survive_selections_of_selections(self):
        whole = make_dataset(12)
        part = whole.select([9, 3, 6]).select([2, 0])
        assert [item["ids"] for item in part] == part.ids == [6, 9]
        assert torch.equal(part[0]["images"], whole[6]["images"])
        assert part.labels() == [whole[6]["labels"], whole[9]["labels"]]


class TestStream:
    """`StreamedImages` on a stream of four rows, of which one is broken."""

    @staticmethod
    def rows(broken=()):
        rows = [{"image": {"bytes": encoded(picture(i, i % 3)), "path": None}, "label": i % 3} for i in range(6)]
        for index in broken:
            rows[index]["image"]["bytes"] = rows[index]["image"]["bytes"][:200]
        return rows

    def stream(self, rows):
        return StreamedImages(rows, NAMES, FIT, name="s", split="train")

    def test_numbered_in_order(self):
        items = list(self.stream(self.rows()))
        assert [item["ids"] for item in items] == list(range(6))
        assert [item["labels"] for item in items] == [0, 1, 2, 0, 1, 2]

    def test_broken_image_is_named(self):
        with pytest.raises(CorruptImageError, match="image 2 of s"):
            list(self.stream(self.rows([2])))

    def test_skipped_images_are_counted_and_keep_their_number(self):
        stream = self.stream(self.rows([2, 3])).without_corrupt()
        assert [item["ids"] for item in stream] == [0, 1, 4, 5]
        assert stream.skipped == 2

    def test_wrong_column(self):
        with pytest.raises(ValueError, match="no column 'label'"):
            list(self.stream([{"image": picture(0, 0)}]))

    def test_label_without_name(self):
        with pytest.raises(ValueError, match="no class name"):
            list(self.stream([{"image": picture(0, 0), "label": 5}]))

    def test_real_stream_with_workers_has_different_ids(self, tmp_path):
        """The id owns the noise: two images must not share one because two workers count from zero."""
        rows = rows_of(8).to_iterable_dataset(num_shards=2).cast_column("image", datasets.Image(decode=False))
        loader = torch.utils.data.DataLoader(self.stream(rows), batch_size=2, num_workers=2, collate_fn=collate_images)
        ids = [sample for batch in loader for sample in batch["ids"].tolist()]
        assert len(ids) == len(set(ids)) == 8

    @pytest.mark.parametrize("shards", [4, 3], ids=["own shards", "own rows"])
    def test_processes_share_a_stream_out(self, shards):
        """Each image goes to one of two processes, and no number is given twice."""
        rows = rows_of(12).to_iterable_dataset(num_shards=shards).cast_column("image", datasets.Image(decode=False))
        stream = self.stream(rows.shuffle(seed=0, buffer_size=4))
        parts = [list(stream.share(rank, 2)) for rank in range(2)]
        assert all(parts)
        seen = [item["images"].sum().item() for part in parts for item in part]
        assert sorted(seen) == sorted(item["images"].sum().item() for item in stream)
        ids = [item["ids"] for part in parts for item in part]
        assert len(ids) == len(set(ids)) == 12


def test_collator_stacks_and_refuses_mixed_sizes():
    items = [make_dataset(3)[i] for i in range(3)]
    batch = collate_images(items)
    assert batch["images"].shape == (3, 3, SIZE, SIZE)
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["ids"].dtype == torch.int64
    items[1]["images"] = items[1]["images"][:, :20]
    with pytest.raises(ValueError, match="differ in size"):
        collate_images(items)
