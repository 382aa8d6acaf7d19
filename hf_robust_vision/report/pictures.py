"""Pictures of results for places that show no SVG; without matplotlib each says what to type (ModuleNotFoundError)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.evaluation.tasks import AnswerExample

from .curve import COLOURS, Curve, axes_of, colours_of, curve_of
from .escape import one_line


MARKERS = "osD^"


def plot_curve(results: Sequence[RobustnessResult], path: str | Path) -> Path:
    """Draw clean (eps 0) and robust accuracy over eps of one dataset and protocol, one line a model, with intervals."""
    curves = [
        curve_of(model, colour, [result for result in results if result.model == model])
        for model, colour in colours_of((result.model for result in results), "before").items()
    ]
    title = f"{results[0].dataset} ({results[0].split}), {results[0].protocol}"
    return plot_panels({title: curves}, axes_of(results[0]), path)


def plot_panels(panels: Mapping[str, Sequence[Curve]], axes: tuple[str, str], path: str | Path) -> Path:
    """Draw curves with their bands, one panel a title; `axes` says what radii and heights count."""
    figure = _figure(5.6 * len(panels), 3.8)
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for column, (title, curves) in zip(columns, panels.items()):
        for place, curve in enumerate(curves):
            eps, colour = [point.eps for point in curve.points], COLOURS[curve.colour % len(COLOURS)][0]
            values = [100 * point.value for point in curve.points]
            bounds = [[100 * bound for bound in (point.low, point.high)] for point in curve.points]
            column.plot(eps, values, marker=MARKERS[place % len(MARKERS)], color=colour, label=one_line(curve.label))
            column.fill_between(eps, *zip(*bounds), color=colour, alpha=0.15, linewidth=0)
        column.set(xlabel=axes[0], ylim=(0, 101), xlim=(0, None))
        column.set_title(one_line(title), fontsize=10, parse_math=False)
        column.grid(alpha=0.25)
    columns[0].set_ylabel(axes[1])
    outside: dict[str, Any] = {} if len(panels) == 1 else {"loc": "outside right upper", "fontsize": 8}
    owner = columns[0] if len(panels) == 1 else figure
    legend = owner.legend(*columns[0].get_legend_handles_labels(), frameon=False, **outside)
    for text in legend.get_texts():
        text.set_parse_math(False)
    figure.savefig(path)
    return Path(path)


def plot_points(points: Mapping[str, tuple[float, float]], axes: tuple[str, str], path: str | Path) -> Path:
    """Draw models as named points of two shares, those between which nobody chooses (something else is better in both) pale."""
    figure = _figure(6.4, 4.6)
    column = figure.subplots()
    for place, (name, (x, y)) in enumerate(points.items()):
        beaten, colour = name not in frontier(points), COLOURS[place % len(COLOURS)][0]
        column.plot(
            100 * x,
            100 * y,
            marker=MARKERS[place // len(COLOURS) % len(MARKERS)],
            linestyle="",
            color=colour,
            alpha=0.45 if beaten else 1,
        )
        column.annotate(
            one_line(name),
            (100 * x, 100 * y),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
            alpha=0.6 if beaten else 1,
            parse_math=False,
        )
    column.set(xlabel=axes[0], ylabel=axes[1])
    column.margins(0.2, 0.15)  # for the names
    column.grid(alpha=0.25)
    figure.savefig(path)
    return Path(path)


def frontier(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other one equals or exceeds in both numbers, and exceeds in one; the first by the first number."""

    def beaten(point: tuple[float, float]) -> bool:
        return any(other != point and other[0] >= point[0] and other[1] >= point[1] for other in points.values())

    return sorted((name for name, point in points.items() if not beaten(point)), key=lambda name: -points[name][0])


def draw_answers(examples: Mapping[str, AnswerExample], question: str, path: str | Path) -> Path:
    """Draw image, enlarged perturbation and attacked image of a question with the answers, one row a model."""
    figure = _figure(6.0, 2.3 * len(examples) + 0.4)
    figure.suptitle(one_line(question), fontsize=11, parse_math=False)
    for row, (name, example) in zip(figure.subplots(len(examples), 3, squeeze=False), examples.items()):
        perturbation = (example.adversarial - example.image) / (2 * example.eps) + 0.5
        titles = (
            f"{name}: {example.clean_answer}",
            f"perturbation x{0.5 / example.eps:.0f}",
            f"attacked: {example.adversarial_answer}",
        )
        for axes, picture, title in zip(row, (example.image, perturbation, example.adversarial), titles):
            axes.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_title(one_line(title), fontsize=9, parse_math=False)
            axes.axis("off")
    figure.savefig(path)
    return Path(path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('plots need matplotlib: pip install "hf-robust-vision[report]"') from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")
