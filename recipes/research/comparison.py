"""Several methods side by side: paired intervals, tables and a picture of what `recipes/research/compare.py` measured.

A comparison is a plain dictionary, as that command writes it to `docs/results/<mode>.json`.
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_robust_vision.files import write_atomically
from hf_robust_vision.report.curve import Curve, Point
from hf_robust_vision.report.pictures import plot_panels
from hf_robust_vision.report.tables import markdown_table


TITLES = {
    "compare": "Methods side by side",
    "compare-robustvlm": "Methods side by side, under a stronger attack",
    "ablation": "What TIMA's parts do",
    "sweep": "TIMA's weights",
    "emoji": "Emoji: many names, near and far",
    "emoji-ablation": "Emoji: what TIMA's parts do",
    "emoji-sweep": "Emoji: TIMA's weights",
}
PLOTTED = ("compare", "emoji")
FOLDERS = ("--docs", "--output_dir", "--output")


def command_line(recipe: str, arguments: Sequence[str]) -> str:
    """The command for a page, without the folders that its files went to."""
    said: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in FOLDERS:
            next(words, None)
        elif not word.startswith(tuple(f"{name}=" for name in FOLDERS)):
            said.append(word)
    return shlex.join(["python", recipe, *said])


def docs_folder(given: Path | None, name: str, settings: Mapping[str, Any]) -> Path:
    """The folder that was asked for, or `docs`, where numbers are only replaced by those of the same settings.

    Args:
        given: Written to whatever it holds.
        name: Of the comparison's JSON file in `docs/results`.
        settings: What the new one is made with, named and nested as in that file; "methods" stands for those of its
            rows. What the file does not tell is not compared.

    Raises:
        ValueError: If a setting is another.
    """
    file = Path("docs/results") / f"{name}.json"
    if given is not None or not file.is_file():
        return given or Path("docs")
    published = json.loads(file.read_text(encoding="utf-8"))
    published["methods"] = list(dict.fromkeys(row.get("method", row["label"]) for row in published["rows"]))
    old = dict(_leaves(published))
    for key, value in _leaves(json.loads(json.dumps(settings))):
        if key in old and old[key] != value:
            said = f"{key.rpartition('.')[2]} {old[key]}, not {value}"
            raise ValueError(
                f"{file} was made with {said}, and would be overwritten; repeat its command ({published['command']}), "
                "or add --docs FOLDER."
            )
    return Path("docs")


def _leaves(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        yield from _leaves(value, f"{path}{name}.") if isinstance(value, Mapping) else [(f"{path}{name}", value)]


def paired_interval(differences: Tensor, draws: int = 10_000) -> tuple[float, float, float]:
    """`stratified_interval` of one data set: differences of shape (seeds, images)."""
    return stratified_interval([differences], draws)


def stratified_interval(parts: Sequence[Tensor], draws: int = 10_000) -> tuple[float, float, float]:
    """Mean difference of two methods with its 95 % bootstrap interval over seeds and images; data sets count alike.

    Each draw takes seeds with replacement, and of each data set images with replacement, the same images for every seed.
    What a seed deviates from the others is stretched by `sqrt(seeds / (seeds - 1))`, without which drawing from so few
    of them would show too little of their spread. With three seeds the interval is still a rough one.

    Args:
        parts: Of each data set, value of the one minus value of the other, shape (seeds, images); all of the same seeds.
        draws: Bootstrap samples.
    """
    generator = torch.Generator().manual_seed(0)
    seeds = len(parts[0])
    stretch = math.sqrt(seeds / (seeds - 1)) if seeds > 1 else 1.0
    drawn = torch.randint(seeds, (draws, seeds), generator=generator)
    means = torch.zeros(draws, dtype=parts[0].dtype)
    for differences in parts:
        common = differences.mean(0)
        # How often each seed was drawn, rather than its images as often: the draws would not fit into memory.
        counts = torch.zeros(draws, seeds, dtype=common.dtype).scatter_add_(
            1, drawn, torch.ones_like(drawn, dtype=common.dtype)
        )
        per_image = common + stretch * (counts @ (differences - common)) / seeds
        images = differences.shape[1]
        means += per_image.gather(1, torch.randint(images, (draws, images), generator=generator)).mean(1)
    low, high = (means / len(parts)).quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return sum(differences.mean().item() for differences in parts) / len(parts), low, high


def table(content: Mapping[str, Any], group: str) -> str:
    """Mean and standard deviation over the seeds, as Markdown."""
    rows = [row for row in content["rows"] if row["group"] == group]
    cells = [
        [row["label"], spread(row["clean_accuracy"]), *map(spread, row["robust_accuracy"].values()), _seconds(row)]
        for row in rows
    ]
    return markdown_table(["method", "clean", *rows[0]["robust_accuracy"], "CPU s"], cells)


def _seconds(row: Mapping[str, Any]) -> str:
    return f"{statistics.mean(row['cpu_seconds']):.0f}"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent; the mean alone of a single value."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


def section(content: Mapping[str, Any]) -> str:
    """One command's tables, with what they were made with."""
    budget = content["budget"]
    ran = content.get("attacks", [content["protocol"]])
    attacks = ", then ".join(map(_said, ran))
    caveat = " Worst case per sample." if len(ran) > 1 else " One attack is not the worst case."
    counts = {row["group"]: row["num_samples"] for row in content["rows"]}
    sources = sorted({source for row in content["rows"] for source in row["source"]})
    made_with = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    text = f"""## {TITLES[content["mode"]]}

`{content["command"]}`

- Data: {content.get("about", "the demo")}, {content["split"]} split; mean ± standard deviation over the seeds, in percent.
- Fine-tuning: {budget["steps"]} updates of {budget["batch_size"]} images, AdamW at {budget["learning_rate"]:g}, attack
  of {budget["training"]["attack_steps"]} steps at {255 * budget["training"].get("attack_eps", 8 / 255):g}/255, seeds {", ".join(map(str, content["seeds"]))}.
- Measured by {attacks}, over all class names.{caveat}
- CPU s: processor seconds of the fine-tuning, on one thread.
- Made with {made_with}.
- Hashes: start checkpoint `{content["hashes"]["start"][:16]}`, prompts `{content["hashes"]["prompts"]}`, source
  {", ".join(f"`{source}`" for source in sources)}.

Classes seen in fine-tuning ({counts["seen"]} images):

{table(content, "seen")}

Classes never seen in it ({counts["unseen"]} images: {", ".join(content["unseen"])}):

{table(content, "unseen")}
"""
    if content["split"] == "validation":
        text += "\nThe unseen classes are those of the test, so no choice may rest on their rows.\n"
    if content.get("paired"):
        text += (
            "\nDifferences in points, with paired 95 % intervals over images and seeds, not corrected for their number:"
            f"\n\n{paired_table(content)}\n"
        )
    return text


def _said(attack: Mapping[str, Any]) -> str:
    aim = f" towards each of the {attack['target']}" if attack.get("target") else ""
    return f"{attack['name']} with {attack['steps']} steps{aim} and {attack['restarts']} restart"


def paired_table(content: Mapping[str, Any]) -> str:
    """Differences of TIMA to its rivals; a claim only where the interval excludes 0."""
    rows = []
    for row in content["paired"]:
        verdict = f"{row['one']} leads" if row["low"] > 0 else f"{row['other']} leads"
        rows.append([f"{row['one']} - {row['other']}", row["group"], row["eps"], *difference(row, verdict)])
    return markdown_table(["difference", "classes", "eps", "points", "95 % interval", "verdict"], rows)


def difference(row: Mapping[str, Any], verdict: str) -> list[str]:
    """Points, their interval, and the verdict where that excludes 0."""
    mean, low, high = (100 * row[key] for key in ("difference", "low", "high"))
    return [f"{mean:+.1f}", f"{low:+.1f} to {high:+.1f}", verdict if low > 0 or high < 0 else "not distinguished"]


def plot(content: Mapping[str, Any], path: Path) -> None:
    """Robust accuracy over eps, one line a method with its standard deviation, one panel a group."""
    panels: dict[str, list[Curve]] = {}
    for row in content["rows"]:
        curves = panels.setdefault(f"classes {row['group']} in fine-tuning", [])
        columns = {"0": row["clean_accuracy"]} | row["robust_accuracy"]
        points = [_point(float(name.split("/")[0]), column) for name, column in columns.items()]
        curves.append(Curve(row["label"], 0 if row["method"] == "undefended" else len(curves) + 1, points))
    plot_panels(panels, ("eps in 255ths", "accuracy under attack, %"), path)


def _point(eps: float, values: Sequence[float]) -> Point:
    mean, half = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return Point(eps, mean, mean - half, mean + half)


def write_page(content: Mapping[str, Any], docs: Path) -> None:
    """Keep one command's numbers, and write the page anew from those of all commands."""
    folder = docs / "results"
    write_atomically(folder / f"{content['mode']}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    if content["mode"] in PLOTTED:
        plot(content, folder / f"{content['mode']}.png")
    write_atomically(docs / "results.md", make_page(docs))


def make_page(docs: Path) -> str:
    """The page of all numbers that lie in `docs/results`."""
    page = "# Results\n\nWritten by `recipes/research/compare.py`; do not edit. The numbers lie in `docs/results/*.json`.\n"
    for mode in TITLES:
        if (file := docs / "results" / f"{mode}.json").is_file():
            page += f"\n{section(json.loads(file.read_text()))}"
            page += f"\n![Robust accuracy over eps](results/{mode}.png)\n" if mode in PLOTTED else ""
    return page
