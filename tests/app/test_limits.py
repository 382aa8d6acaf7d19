"""What a visitor may not hand in: one line each, and nothing of the server in it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from hf_robust_vision.app.limits import LIMITS, check_number, check_picture, check_text, class_names


def noise(size=64):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), dtype=np.uint8))


def written(folder, kind):
    file = folder / f"{kind}.png"
    if kind == "huge":
        Image.new("1", (8660, 5774)).save(file)  # 50 megapixels in a few kB
    elif kind == "heavy":
        noise().save(file)
        with file.open("ab") as tail:
            tail.truncate(int(LIMITS.megabytes * 1e6) + 1)
    elif kind == "text":
        file.write_text("<svg onload=alert(1)>")
    elif kind == "empty":
        file.touch()
    elif kind == "cut":
        noise().save(file)
        file.write_bytes(file.read_bytes()[:-2000])
    elif kind == "thin":
        Image.new("RGB", (2, 1000)).save(file)
    return file


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("huge", "8660 x 5774 pixels, over 16 megapixels"),
        ("heavy", "over 10 MB"),
        ("text", "damaged, or no picture"),
        ("empty", "damaged, or no picture"),
        ("cut", "damaged, or no picture"),
        ("thin", "one edge is over 100 times the other"),
    ],
)
def test_a_file_that_is_no_usable_picture_is_refused(kind, words, tmp_path):
    with pytest.raises(ValueError, match=words) as refused:
        check_picture(written(tmp_path, kind), LIMITS)
    assert str(tmp_path) not in str(refused.value)
    assert "--skip_corrupt" not in str(refused.value)


def test_no_picture_is_refused():
    with pytest.raises(ValueError, match="there is no image"):
        check_picture(None, LIMITS)


def test_of_an_animation_the_first_frame_is_taken(tmp_path):
    file = tmp_path / "moving.gif"
    noise().save(file, save_all=True, append_images=[Image.new("RGB", (64, 64))] * 3)
    assert check_picture(file, LIMITS) == file


@pytest.mark.parametrize(
    ("text", "words"), [("", "there is no text"), (" \n", "there is no text"), (None, "no text"), ("a" * 10_000, "10,000 characters")]
)  # fmt: skip
def test_a_text_that_is_none_or_too_long_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        check_text(text, LIMITS)


def test_class_names_are_parted_by_commas_and_lines():
    assert class_names("a cat, a dog\n a  hen ,", LIMITS) == ["a cat", "a dog", "a  hen"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("cat", "at least two"), (",,", "at least two"), ("cat, dog, cat", "cat: named twice"), (",".join(map(str, range(101))), "101 classes")],
)  # fmt: skip
def test_class_names_that_leave_no_choice_are_refused(text, words):
    with pytest.raises(ValueError, match=words):
        class_names(text, LIMITS)


@pytest.mark.parametrize("value", [0, 33, float("nan"), float("inf"), None, "8", True, [8]])
def test_a_number_that_no_slider_gives_is_refused(value):
    with pytest.raises(ValueError, match="eps must be a number from 1 to 32"):
        check_number("eps", value, 1, 32)
