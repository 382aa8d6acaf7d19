"""Parts of a data set: disjoint, seeded, and checked."""

from __future__ import annotations

import pytest

from hf_robust_vision.data.splits import check_disjoint, seeded_subset, split_off
from hf_robust_vision.data.templates import TEMPLATES, get_templates, read_class_names
from tests.conftest import make_dataset


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
