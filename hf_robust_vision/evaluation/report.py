"""Pictures and tables of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .results import RobustnessResult


def plot_curve(results: Sequence[RobustnessResult], path: str | Path) -> Path:
    """Draw clean (eps 0) and robust accuracy over eps, one line a model, with 95 % intervals.

    Args:
        results: Of one dataset and protocol.
        path: Picture to write; the ending says the format.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed; the message is the line to type.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('plots need matplotlib: pip install "hf-robust-vision[report]"') from error
    figure = Figure(figsize=(5.6, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    styles = {"before": ("#8a8a8a", "o"), "after": ("#1f5fbf", "s")}
    unit = 255 if results[0].norm == "linf" else 1
    for model in dict.fromkeys(result.model for result in results):
        rows = sorted((result for result in results if result.model == model), key=lambda result: result.eps)
        eps = [0.0, *(row.eps * unit for row in rows)]
        accuracy = [rows[0].clean_accuracy, *(row.robust_accuracy for row in rows)]
        bounds = [rows[0].ci95["clean_accuracy"], *(row.ci95["robust_accuracy"] for row in rows)]
        colour, marker = styles.get(model, (None, "d"))
        (line,) = axes.plot(eps, [100 * value for value in accuracy], marker=marker, color=colour, label=model)
        low, high = ([100 * bound[side] for bound in bounds] for side in (0, 1))
        axes.fill_between(eps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    radius = "eps in 255ths of the pixel range, Linf" if unit == 255 else f"eps, {results[0].norm}"
    axes.set(xlabel=radius, ylabel="accuracy under attack, %", ylim=(0, 101), xlim=(0, None))
    axes.set_title(f"{results[0].dataset} ({results[0].split}), {results[0].protocol}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    return Path(path)
