"""Pictures and tables of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.evaluation.tasks import AnswerExample


def plot_curve(results: Sequence[RobustnessResult], path: str | Path) -> Path:
    """Draw clean (eps 0) and robust accuracy over eps, one line a model, with 95 % intervals.

    Args:
        results: Of one dataset and protocol.
        path: Picture to write; the ending says the format.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed; the message is the line to type.
    """
    figure = _figure()(figsize=(5.6, 3.6), dpi=150, layout="constrained")
    axes = figure.subplots()
    styles = {"before": ("#8a8a8a", "o"), "after": ("#1f5fbf", "s")}
    for model in dict.fromkeys(result.model for result in results):
        rows = sorted((result for result in results if result.model == model), key=lambda result: result.level)
        eps = [0.0, *(row.level for row in rows)]
        accuracy = [rows[0].clean_accuracy, *(row.robust_accuracy for row in rows)]
        bounds = [rows[0].ci95["clean_accuracy"], *(row.ci95["robust_accuracy"] for row in rows)]
        colour, marker = styles.get(model, (None, "d"))
        (line,) = axes.plot(eps, [100 * value for value in accuracy], marker=marker, color=colour, label=model)
        low, high = ([100 * bound[side] for bound in bounds] for side in (0, 1))
        axes.fill_between(eps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    radius = "eps in 255ths of the pixel range, Linf" if results[0].norm == "linf" else f"eps, {results[0].norm}"
    axes.set(xlabel=radius, ylabel="accuracy under attack, %", ylim=(0, 101), xlim=(0, None))
    axes.set_title(f"{results[0].dataset} ({results[0].split}), {results[0].protocol}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path)
    return Path(path)


def draw_answers(examples: Mapping[str, AnswerExample], question: str, path: str | Path) -> Path:
    """Draw image, enlarged perturbation and attacked image with the answers, one row a model.

    Args:
        examples: Name of the model to its attacked question.
        question: What was asked.
        path: Picture to write.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed; the message is the line to type.
    """
    figure = _figure()(figsize=(6.0, 2.3 * len(examples) + 0.4), dpi=150, layout="constrained")
    figure.suptitle(question, fontsize=11)
    for row, (name, example) in zip(figure.subplots(len(examples), 3, squeeze=False), examples.items()):
        perturbation = (example.adversarial - example.image) / (2 * example.eps) + 0.5
        titles = (
            f"{name}: {example.clean_answer}",
            f"perturbation x{0.5 / example.eps:.0f}",
            f"attacked: {example.adversarial_answer}",
        )
        for axes, picture, title in zip(row, (example.image, perturbation, example.adversarial), titles):
            axes.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set_title(title, fontsize=9)
            axes.axis("off")
    figure.savefig(path)
    return Path(path)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('plots need matplotlib: pip install "hf-robust-vision[report]"') from error
    return Figure
