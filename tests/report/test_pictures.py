"""The curve is drawn from the results."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from hf_robust_vision.report.pictures import plot_curve
from tests.evaluation.test_results import result


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_picture(norm, tmp_path):
    pytest.importorskip("matplotlib")
    results = [result(model=m, eps=e, norm=norm) for m in ("before", "after", "other") for e in (0.1, 0.2)]
    path = plot_curve(results, tmp_path / "curve.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(10**6)) > 10


def test_missing_matplotlib_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"\[report\]"):
        plot_curve([result()], tmp_path / "curve.png")
