"""Accuracy over eps as SVG that stands in a page or alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from hf_robust_vision.evaluation.results import RobustnessResult

from .tables import with_interval, words


WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 52, 168, 18, 48
MARKERS = ("circle", "square", "diamond", "triangle")
# (light, dark), one a model; the first is the model that was measured as it came.
COLOURS = (
    ("#7c8087", "#9aa0a8"), ("#1d5fd1", "#7fabff"), ("#c2410c", "#ff9d66"), ("#13795b", "#58cfa5"),
    ("#7a3db8", "#c79bff"), ("#94710a", "#e6c04f"), ("#0b7285", "#56cadf"), ("#b0235f", "#ff8fba"),
)  # fmt: skip
STYLE = """
.curve { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
.curve text { fill: var(--soft); }
.curve .grid { stroke: var(--line); stroke-width: 1; }
.curve .chance { stroke: var(--soft); stroke-dasharray: 2 4; }
.curve .band { opacity: .13; stroke: none; }
.curve .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; }
.curve .name { font-weight: 600; }
.curve .leader { stroke-width: 1; opacity: .55; }
"""


@dataclass(frozen=True)
class Point:
    """Accuracy with its 95 % interval, all fractions, at a radius in the unit of the axis."""

    eps: float
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """One model's points in rising order of eps; `colour` is a place in `COLOURS`."""

    label: str
    colour: int
    points: Sequence[Point]


def point(result: RobustnessResult, kind: str) -> Point:
    """The "clean" or the "robust" accuracy of a result."""
    name = f"{kind}_accuracy"
    return Point(0.0 if kind == "clean" else result.level, getattr(result, name), *result.ci95[name])


def curve_of(label: str, colour: int, results: Sequence[RobustnessResult]) -> Curve:
    """Results of one model at different levels, from the clean images on."""
    attacked = sorted((result for result in results if result.level > 0), key=lambda result: result.level)
    return Curve(label, colour, [point(results[0], "clean"), *(point(result, "robust") for result in attacked)])


def axes_of(result: RobustnessResult) -> tuple[str, str]:
    """What radii and heights count."""
    radius = "radius in 255ths of the pixel range, Linf" if result.norm == "linf" else f"radius, {result.norm}"
    height = "images that resist, %" if result.metric == "targeted_success" else f"{words(result.metric)}, %"
    return radius if result.severity is None else "severity", height


def palette() -> str:
    """The colours as CSS variables, for light and for dark."""

    def block(side: int, ground: str) -> str:
        colours = "".join(f"--m{place}: {pair[side]}; " for place, pair in enumerate(COLOURS))
        return f":root {{ {colours}{ground} }}"

    light = block(0, "--ink: #1c1d20; --soft: #63666d; --line: #e4e1d8; --paper: #fcfbf8; --card: #fff;")
    dark = block(1, "--ink: #e9e7e2; --soft: #a2a5ac; --line: #33363d; --paper: #15171b; --card: #1c1f24;")
    return f"{light}\n@media screen and (prefers-color-scheme: dark) {{ {dark} }}"


def draw_curves(
    curves: Sequence[Curve],
    axes: tuple[str, str],
    *,
    title: str,
    chance: float | None = None,
    alone: bool = False,
) -> str:
    """Accuracy over eps, one line a model with its interval as a band, each named at its end.

    Args:
        curves: At least one.
        axes: What radii and heights count.
        title: For readers that can not see it.
        chance: Accuracy of a guess, drawn as a dotted line.
        alone: Bring the style along, for a file of its own.
    """
    widest = max((point.eps for curve in curves for point in curve.points), default=0.0) or 1.0

    def x(eps: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * eps / widest

    def y(accuracy: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - accuracy)

    parts = [f"<title>{escape(title)}</title>"]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{x(widest):.1f}" y1="{y(share):.1f}" y2="{y(share):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{100 * share:.0f}</text>')
    ticks = _apart(sorted({0.0} | {point.eps for curve in curves for point in curve.points}), x)
    parts += [f'<text x="{x(e):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{e:.4g}</text>' for e in ticks]
    middle = (LEFT + x(widest)) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(axes[0])}</text>')
    parts.append(
        f'<text transform="translate(13 {y(0.5):.0f}) rotate(-90)" text-anchor="middle">{escape(axes[1])}</text>'
    )
    if chance is not None:
        parts.append(
            f'<line class="chance" x1="{LEFT}" x2="{x(widest):.1f}" y1="{y(chance):.1f}" y2="{y(chance):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT + 6}" y="{y(chance) - 5:.1f}">chance</text>')
    ends = _spread([y(curve.points[-1].value) for curve in curves])
    for place, (curve, end) in enumerate(zip(curves, ends)):
        colour = f"var(--m{curve.colour % len(COLOURS)})"
        upper = [f"{x(p.eps):.1f},{y(p.high):.1f}" for p in curve.points]
        lower = [f"{x(p.eps):.1f},{y(p.low):.1f}" for p in reversed(curve.points)]
        parts.append(f'<polygon class="band" fill="{colour}" points="{" ".join(upper + lower)}"/>')
        line = " ".join(f"{x(p.eps):.1f},{y(p.value):.1f}" for p in curve.points)
        parts.append(f'<polyline class="line" stroke="{colour}" points="{line}"/>')
        for p in curve.points:
            said = f"{curve.label}, eps {p.eps:.4g}: {with_interval(p.value, (p.low, p.high))}"
            marker = _marker(MARKERS[place % len(MARKERS)], x(p.eps), y(p.value))
            parts.append(f'<g fill="{colour}">{marker}<title>{escape(said)}</title></g>')
        last = curve.points[-1]
        parts.append(
            f'<line class="leader" stroke="{colour}" x1="{x(last.eps) + 6:.1f}" y1="{y(last.value):.1f}" '
            f'x2="{WIDTH - RIGHT + 16}" y2="{end:.1f}"/>'
            f'<text class="name" style="fill: {colour}" x="{WIDTH - RIGHT + 20}" y="{end + 4:.1f}">'
            f"{escape(_short(curve.label))}</text>"
        )
    style = f"<style>{palette()}{STYLE}</style>" if alone else ""
    space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
    shape = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}"'
    return f'<svg class="curve"{space} {shape}>{style}{"".join(parts)}</svg>'


def _marker(kind: str, x: float, y: float) -> str:
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if kind == "square":
        return f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"/>'
    if kind == "diamond":
        return f'<path d="M{x:.1f} {y - 5:.1f}l5 5-5 5-5-5z"/>'
    return f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z"/>'


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


def _short(label: str) -> str:
    return label if len(label) <= 22 else f"{label[:21]}…"
