"""Accuracy over eps as SVG that stands in a page or alone; `pages/curve.svg` draws it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_robust_vision.evaluation.results import RobustnessResult

from .tables import Point, point, words
from .templates import template


WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 168, 18, 48
# (light, dark), one a model.
COLOURS = (
    ("#7c8087", "#9aa0a8"), ("#1d5fd1", "#7fabff"), ("#c2410c", "#ff9d66"), ("#13795b", "#58cfa5"),
    ("#7a3db8", "#c79bff"), ("#94710a", "#e6c04f"), ("#0b7285", "#56cadf"), ("#b0235f", "#ff8fba"),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One model's points in rising order of eps; `colour` is a place in `COLOURS`."""

    label: str
    colour: int
    points: Sequence[Point]


def colours_of(labels: Iterable[str], original: str) -> dict[str, int]:
    """A colour for each model, the original first: grey is kept for it, and stays free where it is missing.

    A label is that of the original where its first word is, since two originals carry their hashes as a second one.
    """
    order = sorted(dict.fromkeys(labels), key=lambda label: label.split(" ")[0] != original)
    return {label: place for place, label in enumerate(order, int(order[0].split(" ")[0] != original))}


def curve_of(label: str, colour: int, results: Sequence[RobustnessResult]) -> Curve:
    """Results of one model at different levels, from the clean images on."""
    attacked = sorted((result for result in results if result.level > 0), key=lambda result: result.level)
    return Curve(label, colour, [point(results[0], "clean"), *(point(result, "robust") for result in attacked)])


def axes_of(result: RobustnessResult) -> tuple[str, str]:
    """What radii and heights count."""
    radius = "radius in 255ths of the pixel range, Linf" if result.norm == "linf" else f"radius, {result.norm}"
    height = "images that resist, %" if result.metric == "targeted_success" else f"{words(result.metric)}, %"
    return radius if result.severity is None else "severity", height


def draw_curves(
    curves: Sequence[Curve], axes: tuple[str, str], *, title: str, chance: float | None = None, alone: bool = False
) -> str:
    """Accuracy over eps, one line a model with its interval as a band, each named at its end.

    `axes` says what radii and heights count, `title` all of it to readers that can not see it; `chance` is the accuracy
    of a guess, a dotted line. A picture that stands `alone`, in a file of its own, brings its style along.
    """
    radii = sorted({0.0} | {point.eps for curve in curves for point in curve.points})

    def x(eps: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * eps / (radii[-1] or 1.0)  # clean points alone have no other radius

    def y(accuracy: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - accuracy)

    place = {"x": x, "y": y, "left": LEFT, "right": WIDTH - RIGHT, "bottom": BOTTOM, "width": WIDTH, "height": HEIGHT}
    ends = zip(curves, _spread([y(curve.points[-1].value) for curve in curves]))
    said = {"axes": axes, "title": title, "chance": chance, "alone": alone, "colours": COLOURS}
    return template("curve.svg").render(**place, **said, curves=list(ends), ticks=_apart(radii, x))


def _apart(ticks: Sequence[float], x: Callable[[float], float], gap: float = 26) -> list[float]:
    """The ticks that can be labelled without touching; the last one always."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or x(tick) - x(kept[-1]) >= gap:
            kept.append(tick)
    if kept[-1] != ticks[-1]:
        kept[-1] = ticks[-1]
    return kept


def _spread(heights: Sequence[float], gap: float = 16) -> list[float]:
    """Heights for labels: near the wanted ones, in their order, at least `gap` apart, inside the frame."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    placed = dict(zip(order, sorted(heights)))
    for above, below in pairwise(order):
        placed[below] = max(placed[below], placed[above] + gap)
    floor = float(HEIGHT - BOTTOM)
    for place in reversed(order):
        placed[place] = min(placed[place], floor)
        floor = placed[place] - gap
    return [placed[place] for place in range(len(heights))]
