"""From `pip install` to the first measured number of one's own photos: two commands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import stopwatch
from PIL import Image

from hf_robust_vision.data.folders import is_unsplit, read_folder


def test_photos_are_as_a_person_keeps_them(tmp_path):
    """Folders of classes, no splits, of which one photo a class is the test."""
    stopwatch.write_photos(tmp_path / "photos")
    assert is_unsplit(tmp_path / "photos")
    with pytest.warns(UserWarning, match="has no splits; drawn"):
        rows, test = read_folder(tmp_path / "photos", "test")
    assert rows.features["label"].names == sorted(stopwatch.CLASSES)
    assert (len(rows), len(test)) == (stopwatch.PER_CLASS * len(stopwatch.CLASSES), len(stopwatch.CLASSES))
    assert {Image.open(path).size for path in rows["image"][:5]} == {(64, 64)}


@pytest.mark.slow
def test_two_commands_give_a_number(capsys):
    stopwatch.main()
    said = capsys.readouterr().out
    assert (
        len(re.findall(r"^ +[\d.]+ s, +[\d.]+ s of CPU  (?:pip install|hf-robust-vision evaluate)", said, re.M)) == 2
    )
    assert re.search(rf"^{len(stopwatch.CLASSES)} photos, eps 4/255: clean [\d.]+%, robust [\d.]+%$", said, re.M)
    assert re.search(r"^2 commands, \d+ s, \d+ cores$", said, re.M)
    assert Path(stopwatch.ROOT / "pyproject.toml").is_file()
