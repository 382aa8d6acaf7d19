"""Towers side by side in a VLM: the page of what `recipes/research/compare_towers.py` measured.

A comparison is a plain dictionary, as that command writes it to `docs/results/NAME.json`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import difference, spread

from hf_robust_vision.evaluation.results import eps_text
from hf_robust_vision.files import write_atomically
from hf_robust_vision.report.escape import Verbatim
from hf_robust_vision.report.tables import markdown_table


def write_towers(content: Mapping[str, Any], docs: Path, name: str = "towers") -> Path:
    """Keep the numbers, write the page from them, and return its path."""
    folder = docs / "results"
    write_atomically(folder / f"{name}.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / f"{name}.md", towers_page(content, name))
    return folder / f"{name}.md"


def towers_page(content: Mapping[str, Any], name: str = "towers") -> str:
    """All tables, with what they were made with, as Markdown."""
    training, how = content["training"], content["measuring"]
    made_with = ", ".join(f"{name} {number}" for name, number in content["versions"].items())
    sources = sorted({source for row in content["rows"] for source in row["source"]})
    text = f"""# Where to harden a tower for a VLM

Written by `recipes/research/compare_towers.py`; do not edit. The numbers lie in `{name}.json`.

`{content["command"]}`

- Data: the demo. {_vlms(content)}; mean ± standard deviation over the seeds
  ({", ".join(map(str, content["seeds"]))}), in percent.
- Fine-tuning: {training["max_steps"]} updates of {training["per_device_train_batch_size"]} images, attack of
  {training["attack_steps"]} steps at {eps_text(training["attack_eps"], "linf")}, but for what a row names; AdamW at the rate of the table,
  {training["lr_scheduler_type"]} schedule.
- Answers: {content["num_questions"]} colour and shape questions on {how.get("split", "test")} images. PGD-{how["attack_steps"]} through the whole
  VLM on the answer's loss and on its margin, random starts each: {how["restarts"]}; worst case per question.
{_clip_alone(content)}- CPU s: of the fine-tuning, one thread.
- Made with {made_with}.
- Hashes: {", ".join(f"{_HASHED[one]} `{value[:16]}`" for one, value in content["hashes"].items())}, source
  {", ".join(f"`{source}`" for source in sources)}.

{_rows(content["rows"])}
"""
    if content["paired"]:
        text += f"\nAnswers that stand, in points, over questions and seeds:\n\n{_paired(content['paired'])}\n"
    if content["choice"]:
        first = content["seeds"][0]
        text += f"""
The rates are those with the most answers standing at 8/255 on {content["choice_questions"]} validation questions, with
seed {first}:

{_choice(content["choice"])}
"""
    return text


_HASHED = {"clip": "start checkpoint", "llava": "LLaVA", "vlm": "VLM", "asked": "VLM that is asked"}


def _vlms(content: Mapping[str, Any]) -> str:
    asked = content["measuring"].get("vlm", "demo-llava")
    through = content.get("vlm", asked)
    if content.get("in_place"):
        return f"The tower of `{asked}`, hardened in place"
    return f"Towers swapped into `{asked}`" + (f", hardened for `{through}`" if through != asked else "")


def _clip_alone(content: Mapping[str, Any]) -> str:
    if not content["num_images"]:
        return ""
    how = content["measuring"]
    return f"""- Zero-shot: {content["num_images"]} {how.get("split", "test")} images, all class names, APGD-CE with {how["zero_shot_steps"]} steps; one attack is not the worst case.
- Cosine: clean patch tokens at the layer that the VLM reads, old tower to new.
"""


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    eps, alone = list(rows[0]["answers"]), bool(rows[0]["zero_shot"])
    table = []
    for row in rows:
        trained = row["learning_rate"]
        seen = (
            [spread(row["zero_shot_clean"]), spread(row["zero_shot"]), f"{statistics.mean(row['drift']):.3f}"]
            if alone
            else []
        )
        table.append([
            Verbatim(row["label"]), f"{trained:g}" if trained else "", spread(row["answers_clean"]),
            *(spread(row["answers"][radius]) for radius in eps), *seen,
            f"{statistics.mean(row['cpu_seconds']):.0f}" if trained else "",
        ])  # fmt: skip
    more = ["zero-shot, clean", "8/255", "cosine"] if alone else []
    return markdown_table(["tower", "rate", "answers, clean", *eps, *more, "CPU s"], table)


def _paired(rows: Sequence[Mapping[str, Any]]) -> str:
    table = [
        [
            Verbatim(f"{row['one']} - {row['other']}"),
            row["eps"],
            *difference(row, "higher" if row["low"] > 0 else "lower"),
        ]
        for row in rows
    ]
    return markdown_table(["difference", "eps", "points", "95 % interval", "verdict"], table)


def _choice(rows: Sequence[Mapping[str, Any]]) -> str:
    table = [
        [
            Verbatim(row["label"]),
            f"{row['learning_rate']:g}",
            spread([row["clean_accuracy"]]),
            spread([row["robust_accuracy"]]),
        ]
        for row in rows
    ]
    return markdown_table(["tower", "rate", "answers, clean", "8/255"], table)
