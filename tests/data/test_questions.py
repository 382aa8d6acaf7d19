"""Files of questions and captions: what they say is what is asked, or they are refused by line."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from hf_robust_vision.data.decode import CorruptImageError
from hf_robust_vision.data.questions import Captioned, Question, need_decodable, read_captioned, read_questions
from hf_robust_vision.pixels import PixelTransform


@pytest.fixture
def write(tmp_path):
    (tmp_path / "images").mkdir()
    for name, colour in (("a.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / name)

    def write(name, text):
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return file

    return write


def test_csv_and_jsonl_say_the_same(write, tmp_path):
    """As Excel writes it, with a mark before the first name, and with a comma in a question."""
    table = write("q.csv", '\ufeffimage,question,answer\nimages/a.png,"What, here?",red\nimages/b.png,How many?,3\n')
    rows = [
        {"image": "images/a.png", "question": "What, here?", "answer": "red"},
        {"image": "images/b.png", "question": "How many?", "answer": 3, "source": "mine"},
    ]
    lines = write("q.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n")
    wanted = [
        Question(1, str(tmp_path / "images/a.png"), "What, here?", "red"),
        Question(2, str(tmp_path / "images/b.png"), "How many?", "3"),
    ]
    assert read_questions(table) == read_questions(lines) == wanted
    pixels = wanted[0].pixels(PixelTransform(8, (8, 8)))
    assert torch.equal(pixels, torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 8, 8))
    assert wanted[0].fingerprint != wanted[1].fingerprint


def test_captions_of_one_image_are_its_references(write, tmp_path):
    table = write("c.csv", "image,caption\nimages/a.png,red\nimages/b.png,blue\nimages/a.png,a red square\n")
    lines = write(
        "c.jsonl",
        '{"image": "images/a.png", "caption": ["red", "a red square"]}\n{"image": "images/b.png", "caption": "blue"}',
    )
    wanted = [
        Captioned(1, str(tmp_path / "images/a.png"), "", ["red", "a red square"]),
        Captioned(2, str(tmp_path / "images/b.png"), "", ["blue"]),
    ]
    assert read_captioned(table) == read_captioned(lines) == wanted


GOOD = '{"image": "images/a.png", "question": "q", "answer": "a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("q.txt", "", r"must be a .csv or .jsonl file with image, question, answer"),
        ("q.csv", "", "holds no rows"),
        ("q.csv", "image,question,answer\n", "holds no rows"),
        ("q.csv", "image,question\nimages/a.png,q\n", "line 2 has no 'answer'"),
        ("q.csv", "image,question,answer\nimages/a.png,q\n", "line 2 has no 'answer'"),
        ("q.csv", 'image,question,answer\nimages/a.png,"q"x,a\n', "line 2 is no CSV"),
        ("q.csv", "image,question,answer\nimages/a.png,q,a\nimages/c.png,q,a\n", "line 3: there is no image"),
        ("q.csv", "image,question,answer\nimages,q,a\n", "line 2: there is no image"),
        ("q.jsonl", GOOD + "{", "line 2 is not JSON"),
        ("q.jsonl", GOOD + "[1]", "line 2 must be an object"),
        ("q.jsonl", GOOD + GOOD.replace('"a"', "true"), "line 2 has no 'answer': wanted text, got True"),
        ("q.jsonl", GOOD + GOOD.replace('"a"', '" "'), "line 2 has no 'answer'"),
        ("q.jsonl", GOOD + GOOD.replace('"q"', "[]"), "line 2 has no 'question'"),
    ],
)
def test_what_is_no_question_is_refused_by_line(write, name, text, said):
    with pytest.raises(ValueError, match=said):
        read_questions(write(name, text))


def test_empty_lists_of_captions_are_refused(write):
    with pytest.raises(ValueError, match="line 1 has no 'caption'"):
        read_captioned(write("c.jsonl", '{"image": "images/a.png", "caption": []}'))


def test_broken_images_are_named_or_left_out(write, tmp_path):
    (tmp_path / "images" / "c.png").write_bytes(b"no image")
    questions = read_questions(write("q.csv", "image,question,answer\nimages/a.png,q,a\nimages/c.png,q,a\n"))
    with pytest.raises(CorruptImageError, match=r"c\.png"):
        need_decodable(questions, skip=False)
    with pytest.warns(UserWarning, match="skipped 1 corrupt"):
        assert need_decodable(questions, skip=True) == questions[:1]
