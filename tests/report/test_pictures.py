"""The curve is drawn from the results."""

from __future__ import annotations

import sys

import pytest
from PIL import Image

from hf_robust_vision.report.curve import Curve, Point
from hf_robust_vision.report.pictures import frontier, plot_curve, plot_panels, plot_points
from tests.evaluation.test_results import result


POINTS = [Point(0, 1, 0.9, 1), Point(4, 0.5, 0.4, 0.6)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_picture(norm, tmp_path):
    pytest.importorskip("matplotlib")
    results = [result(model=m, eps=e, norm=norm) for m in ("before", "after", "other") for e in (0.1, 0.2)]
    path = plot_curve(results, tmp_path / "curve.png")
    with Image.open(path) as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(10**6)) > 10


@pytest.mark.filterwarnings("ignore:Glyph")  # a font need not know every letter
@pytest.mark.parametrize("name", ["$x", "a $\\frac$ b", "$\\nothing{$", "undecodable \udcff", "\x00", "two\nlines"])
def test_a_name_is_no_formula(name, tmp_path):
    """findings-reliability 13: matplotlib would read it between dollar signs, and fail at the end of the run."""
    pytest.importorskip("matplotlib")
    assert plot_curve([result(dataset=name, model=name)], tmp_path / "curve.png").stat().st_size > 0
    plot_panels({"one": [Curve(name, 1, POINTS)], name: [Curve(name, 2, POINTS)]}, ("eps", "%"), tmp_path / "two.png")


def test_missing_matplotlib_says_what_to_type(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"\[report\]"):
        plot_curve([result()], tmp_path / "curve.png")


def test_what_there_is_to_choose_between():
    points = {"a": (0.5, 0.1), "b": (0.4, 0.2), "c": (0.4, 0.1), "d": (0.3, 0.3), "e": (0.3, 0.3), "f": (0.2, 0.25)}
    assert frontier(points) == ["a", "b", "d", "e"]
    assert frontier({"alone": (0.0, 0.0)}) == ["alone"]


def test_points_have_their_names(tmp_path):
    pytest.importorskip("matplotlib")
    names = {f"$model_{number}": (number / 20, 1 - number / 20) for number in range(12)}  # more than there are colours
    assert plot_points(names, ("clean, %", "robust, %"), tmp_path / "a.png").stat().st_size > 0
