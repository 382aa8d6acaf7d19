"""The offline demo: classes, splits, labels against the questions, and the checkpoint."""

from __future__ import annotations

import json

import pytest

from hf_robust_vision.data import demo
from hf_robust_vision.data.demo import CLASS_NAMES, COLOURS, SHAPES, demo_checkpoint, demo_rows, load_demo
from hf_robust_vision.data.splits import check_disjoint
from hf_robust_vision.pixels import PixelTransform


pytest.importorskip("easy_vqa")
FIT = PixelTransform(64, (64, 64))


def test_24_classes_all_present():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 24
    assert {row["label"] for row in demo_rows("train")} == set(range(24))


def test_splits_are_disjoint_and_the_same_each_time():
    parts = {name: load_demo(name, FIT) for name in ("train", "validation", "test")}
    check_disjoint(*parts.values())
    assert not set(parts["train"].ids) & set(parts["validation"].ids)
    assert len(parts["validation"]) == 256
    paths = {name: {part.rows[i]["image"] for i in part.ids} for name, part in parts.items()}
    assert not paths["train"] & paths["test"]
    assert not paths["validation"] & paths["test"]
    assert load_demo("validation", FIT).ids == parts["validation"].ids


def test_labels_answer_the_questions():
    """Every plain question ("what color ...", "what shape ...") is answered by the label, on both sources."""
    checked = 0
    for source in ("train", "test"):
        labels = {row["number"]: CLASS_NAMES[row["label"]].split() for row in demo_rows(source)}
        for question, answer, image in json.loads((demo.demo_folder() / source / "questions.json").read_text()):
            if image in labels and answer in (*COLOURS, *SHAPES):
                assert answer in labels[image], (question, answer, image)
                checked += 1
    assert checked > 5000


@pytest.mark.parametrize(
    ("question", "answer", "values", "left"),
    [
        ("is there a red shape?", "yes", COLOURS, {"red"}),
        ("is there a red shape?", "no", COLOURS, set(COLOURS) - {"red"}),
        ("is there not a red shape?", "no", COLOURS, {"red"}),
        ("is no circle present?", "yes", SHAPES, {"rectangle", "triangle"}),
        ("what color is the circle?", "blue", COLOURS, {"blue"}),
        ("what color is the circle?", "blue", SHAPES, {"circle"}),
        ("what shape is in the image?", "triangle", SHAPES, {"triangle"}),
        ("is there a red shape?", "yes", SHAPES, set(SHAPES)),
    ],
)
def test_one_question(question, answer, values, left):
    candidates = set(values)
    demo._narrow(candidates, set(values), question, answer)
    assert candidates == left


def test_colour_of_the_pixels():
    """Red images are red: the mean of the shape's pixels against the background."""
    rows = [row for row in demo_rows("test") if CLASS_NAMES[row["label"]].startswith(("red", "blue"))][:20]
    part = load_demo("test", FIT)
    place = {row["number"]: index for index, row in enumerate(part.rows)}
    for row in rows:
        image = part[place[row["number"]]]["images"].flatten(1)
        colour = image[:, (image - image[:, :1]).abs().sum(0).argmax()]
        strongest = "red" if colour[0] > colour[2] else "blue"
        assert CLASS_NAMES[row["label"]].startswith(strongest)


def test_checkpoint_is_shipped_and_small():
    folder = demo_checkpoint()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["CLIPModel"]
    assert sum(file.stat().st_size for file in folder.iterdir()) < 15e6
    with pytest.raises(ValueError, match="'nope'.*demo-clip"):
        demo_checkpoint("nope")


def test_unknown_split():
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_demo("dev", FIT)


def test_missing_package_says_what_to_type(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "easy_vqa", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .*\[demo\]"):
        demo.demo_folder()
