"""Parts of a data set: disjoint, seeded, and checked."""

from __future__ import annotations

import time

import datasets
import pytest

import hf_robust_vision.data.datasets as data_sets
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.decode import CorruptImageError, decode_image
from hf_robust_vision.data.demo_questions import load_questions
from hf_robust_vision.data.splits import check_disjoint, seeded_subset, split_off, without_corrupt
from hf_robust_vision.data.templates import TEMPLATES, get_templates, read_class_names
from hf_robust_vision.pixels import PixelTransform
from tests.conftest import NAMES, SIZE, make_dataset, picture


FIT = PixelTransform(SIZE, (SIZE, SIZE))


def test_split_off_is_disjoint_complete_and_seeded():
    whole = make_dataset(24)
    rest, drawn = split_off(whole, 6, seed=3, name="validation")
    assert len(drawn) == 6
    assert not set(rest.ids) & set(drawn.ids)
    assert set(rest.ids) | set(drawn.ids) == set(whole.ids)
    assert (rest.split, drawn.split) == ("train", "validation")
    assert split_off(whole, 6, seed=3, name="x")[1].ids == drawn.ids
    assert split_off(whole, 6, seed=4, name="x")[1].ids != drawn.ids
    check_disjoint(rest, drawn)


@pytest.mark.parametrize("size", [0, 24, 25, -1])
def test_split_off_leaves_something(size):
    with pytest.raises(ValueError, match=f"draw {size} of the 24"):
        split_off(make_dataset(24), size, seed=0, name="validation")


def test_subset():
    whole = make_dataset(24)
    assert seeded_subset(whole, None, seed=0) is whole
    assert seeded_subset(whole, 99, seed=0) is whole
    part = seeded_subset(whole, 5, seed=0)
    assert part.ids == seeded_subset(whole, 5, seed=0).ids == sorted(part.ids)
    assert part.ids != [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [0, -1])
def test_a_subset_of_nothing(size):
    """findings-reliability 8: `--max_samples -1` took all but one image, 0 ended in a NaN on disk."""
    with pytest.raises(ValueError, match=f"at least 1 sample, got {size}; without a limit all 24"):
        seeded_subset(make_dataset(24), size, seed=0)
    with pytest.raises(ValueError, match=f"at least 1 sample, got {size}"):
        load_questions("test", limit=size)


def test_a_selection_of_nothing():
    with pytest.raises(ValueError, match=r"tiny \(test\): no image of 24 is left"):
        make_dataset(24).select([], "test")


class TestWithoutCorrupt:
    """findings-scale 2 and findings-reliability 8."""

    @staticmethod
    def images(count, broken):
        rows = [{"image": b"no image" if i in broken else picture(i, i % 3), "label": i % 3} for i in range(count)]
        return LabelledImages(rows, NAMES, FIT, name="x", split="train")

    def test_the_rest_is_left(self):
        images = self.images(12, {1, 5})
        with pytest.warns(UserWarning, match=r"skipped 2 corrupt images of x \(train\)"):
            assert without_corrupt(images, skip=True).ids == [0, 2, 3, 4, *range(6, 12)]
        with pytest.raises(CorruptImageError, match="image 1 of x is corrupt"):
            without_corrupt(images, skip=False)

    @pytest.mark.filterwarnings("ignore:skipped")
    def test_nothing_is_left(self):
        with pytest.raises(ValueError, match=r"no image of 4 is left"):
            without_corrupt(self.images(4, range(4)), skip=True)

    def test_each_process_decodes_its_share(self, monkeypatch):
        images, decoded = self.images(9, {0, 3, 8}), []
        monkeypatch.setattr(data_sets, "decode_image", lambda *given: decoded.append(given) or decode_image(*given))
        monkeypatch.setattr(data_sets, "rank_and_world", lambda: (1, 2))
        monkeypatch.setattr(data_sets, "gather", lambda mine: [*mine, 8, 0])  # of the other
        assert images.corrupt() == [0, 3, 8]
        assert len(decoded) == 4

    def test_a_large_set(self, monkeypatch):
        """A set made anew for each row took time with the square of their number."""
        images = make_dataset(3)
        images.ids = list(range(3)) * 20_000
        monkeypatch.setattr(LabelledImages, "corrupt", lambda self: list(range(0, len(self), 2)))
        start = time.perf_counter()
        with pytest.warns(UserWarning, match="skipped 30000"):
            assert len(without_corrupt(images, skip=True)) == 30_000
        assert time.perf_counter() - start < 2  # with a set for each: half a minute


def test_the_same_rows_opened_twice():
    """Two names of one split, or a link to it, are one source."""
    rows = datasets.Dataset.from_dict({"image": ["none"] * 6, "label": [0, 1, 2] * 2})
    first, second = (LabelledImages(rows, NAMES, FIT, name="x", split=split) for split in ("val", "validation"))
    with pytest.raises(ValueError, match="val and validation of x share 6 images"):
        check_disjoint(first, second)


def test_shared_images_are_refused():
    whole = make_dataset(24)
    with pytest.raises(ValueError, match=r"share 2 images \(ids \[3, 4\]\)"):
        check_disjoint(whole.select([0, 3, 4]), whole.select([8]), whole.select([4, 3, 7], "test"))


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_named_templates(name):
    assert all(template.count("{}") == 1 for template in get_templates(name))


def test_templates_of_a_file(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {}\n\n  the {} here \n")
    assert get_templates(str(file)) == ("a {}", "the {} here")
    file.write_text("a {}\nno place\n")
    with pytest.raises(ValueError, match="needs one"):
        get_templates(str(file))
    with pytest.raises(ValueError, match="neither a file nor one of"):
        get_templates("nope")


def test_class_names_of_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("red\ngreen \n\nblue\n")
    (tmp_path / "names.json").write_text('["red", "green", "blue"]')
    assert read_class_names(tmp_path / "names.txt") == read_class_names(tmp_path / "names.json")
    for content in ('{"0": "red"}', '["red", 3]', '["red", ""]'):
        (tmp_path / "names.json").write_text(content)
        with pytest.raises(ValueError, match="list of texts"):
            read_class_names(tmp_path / "names.json")
    with pytest.raises(ValueError, match="not a file"):
        read_class_names(tmp_path / "nope.txt")
