from __future__ import annotations

import pytest
from benchmarks import demo_benchmark
from PIL import Image

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.demo import CLASS_NAMES, COLOURS, SHAPES
from hf_robust_vision.data.splits import only_classes, relabel
from hf_robust_vision.pixels import PixelTransform


NAMES = ("cat", "dog", "owl")


@pytest.fixture
def animals():
    rows = [{"image": Image.new("RGB", (4, 4), (place * 20, 0, 0)), "label": place % 3} for place in range(9)]
    return LabelledImages(rows, NAMES, PixelTransform(resize=4, crop=(4, 4)), name="animals", split="train")


def test_demo_groups_are_a_partition_that_shows_every_colour_and_shape():
    groups = demo_benchmark().groups()
    assert sorted(groups["seen"] + groups["unseen"]) == sorted(CLASS_NAMES)
    assert len(groups["unseen"]) == 6
    words = {word for name in groups["seen"] for word in name.split()}
    assert words == {*COLOURS, *SHAPES}


def test_only_classes_keeps_labels_names_and_ids(animals):
    some = only_classes(animals, ["owl", "cat"])
    assert some.class_names == NAMES
    assert some.labels() == [0, 2, 0, 2, 0, 2]
    assert some.ids == [0, 2, 3, 5, 6, 8]


def test_relabel_knows_no_other_class(animals):
    some = relabel(animals, ["owl", "cat"])
    assert some.class_names == ("owl", "cat")
    assert some.labels() == [1, 0, 1, 0, 1, 0]
    assert some.ids == [0, 2, 3, 5, 6, 8]
    assert [item["labels"] for item in some] == some.labels()
    assert [item["images"][0, 0, 0].item() * 255 for item in some] == pytest.approx([0, 40, 60, 100, 120, 160])
    some.check_labels()


def test_an_unknown_class_is_refused(animals):
    with pytest.raises(ValueError, match="'fox'"):
        only_classes(animals, ["fox", "cat"])
