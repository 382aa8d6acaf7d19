"""The model card: the measured numbers, how they were measured, and how the model was trained."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CardData, DatasetCard, EvalResult, ModelCard, ModelCardData

from hf_robust_vision.data.demo import DEMO_MODELS
from hf_robust_vision.evaluation.consistency import check_attacked, check_results
from hf_robust_vision.evaluation.results import RobustnessResult
from hf_robust_vision.files import write_atomically
from hf_robust_vision.report import protocol
from hf_robust_vision.report.curve import axes_of
from hf_robust_vision.report.tables import counted, percent, point, training_settings
from hf_robust_vision.report.templates import template
from hf_robust_vision.towers.vlm import vlm_class

from .eval_files import eval_files
from .usage import usage_block


# The last one lists everything that this package published: `HfApi().list_models(filter="hf-robust-vision")`.
TAGS = ("adversarial-robustness", "robust-vision-encoder", "hf-robust-vision")

# Library, task and relation to the original: what makes the Hub list a repository, and offer the right lines for it.
_KINDS = {
    "model": ("transformers", "zero-shot-image-classification", "finetune"),
    "tower": ("transformers", "image-feature-extraction", "finetune"),
    "adapter": ("peft", "zero-shot-image-classification", "adapter"),
    "vlm": ("transformers", "image-text-to-text", "finetune"),
}

_FAMILIES = {"CLIPModel": "CLIP", "SiglipModel": "Siglip"}

# Task of a result -> task of the Hub.
_TASKS = {
    "zero_shot": "zero-shot-image-classification",
    "corruption": "zero-shot-image-classification",
    "vqa": "visual-question-answering",
    "caption": "image-to-text",
}


@dataclass(frozen=True)
class CardSettings:
    """What a card tells beside its numbers."""

    model_name: str  # title
    model_class: str = "CLIPModel"  # "SiglipModel", or another one: that of a VLM
    # Hub id of the original. A mere folder name is told in the text only: as metadata it would link to somebody else's
    # model, or to none.
    base_model: str | None = None
    tower: str | None = None  # where the tower of a VLM comes from, if it was swapped in
    dataset: str | None = None  # Hub id of the fine-tuning data; None where it is not on the Hub
    tags: Sequence[str] = ()  # more of them, such as the method
    picture: str | None = None  # file name of the curve beside the card
    license: str | None = None  # such as "apache-2.0" or "mit"; see `license_of`
    paper: str | None = None  # arXiv number of the method


def make_card(results: Sequence[RobustnessResult], **settings: Any) -> ModelCard:
    """A card whose table and `model-index` hold the same numbers as `robustness.json`; see `CardSettings`.

    The results are of the hardened model (`model="after"`), at least one, and of the original (`model="before"`); one
    that no attack was made for is a ValueError.
    """
    about, after = CardSettings(**settings), hardened(results)
    for result in results:
        check_attacked(result)
    if not after:
        raise ValueError("a card needs at least one measured result of the hardened model.")
    family = _FAMILIES.get(about.model_class)
    kind = "vlm" if family is None else "model"
    data = ModelCardData(
        model_name=about.model_name,
        license=about.license,
        tags=[*TAGS, *([family.lower()] if family else []), *about.tags],
        datasets=[about.dataset] if about.dataset else None,
        eval_results=eval_results(after),
    )
    set_kind(data, kind, about.base_model)
    trained = next((result for result in after if result.training), after[0])
    training = trained.training or {}
    one_tower = training.get("text_params", "none") == "none"
    text = template("card.md").render(
        about=about,
        tuned="vision tower was" if one_tower else "vision and text towers were",
        method=training.get("method", "an unknown method"),
        headline=headline(results),
        axes=axes_of(after[0]),
        usage=usage_block(kind, ".", after[0], about.base_model, family or ""),
        rows=[_row(result, results[0]) for result in results],
        tables=[protocol.Table(rows) for rows in protocol.grouped(((one.model, one), one) for one in after)],
        training=training_settings(trained),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def set_kind(data: CardData, kind: str, base_model: str | None) -> None:
    """Say in a card's metadata what the repository holds ("model", "tower", "adapter" or "vlm") and what it was made from."""
    data["library_name"], data["pipeline_tag"], relation = _KINDS[kind]
    on_hub = base_model is not None and is_hub_id(base_model)
    data["base_model"], data["base_model_relation"] = (base_model, relation) if on_hub else (None, None)


def hardened(results: Sequence[RobustnessResult]) -> list[RobustnessResult]:
    """The results that a card is about: all but those of the original."""
    return [result for result in results if result.model != "before"]


def is_hub_id(name: str) -> bool:
    """Does a name look like `owner/model`, and is it no folder of this machine?"""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and name[0] not in "./" and not Path(name).exists()


def write_card(folder: str | Path, results: Sequence[RobustnessResult], **settings: Any) -> Path:
    """Write `README.md` into a model folder, as `make_card`, and `.eval_results/` where data sets are on the Hub.

    The samples files of the folder must say what the results say.
    """
    check_results(results, folder)
    path, config = Path(folder) / "README.md", Path(folder) / "config.json"
    if vlm := vlm_class(folder):
        settings["model_class"] = vlm
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("model_type") == "siglip":
        settings["model_class"] = "SiglipModel"
    write_atomically(path, str(make_card(results, **settings)))
    for place, content in eval_files(hardened(results)).items():
        write_atomically(Path(folder) / place, content.decode())
    return path


def license_of(name: str | Path, kind: str = "model") -> str | None:
    """The licence that the card of a "model" or "dataset" states, which what is made from it inherits; None if it does not.

    What is on the Hub is asked there, or in the cache where `HF_HUB_OFFLINE` is set.
    """
    if str(name) in DEMO_MODELS and not Path(name).is_dir():
        return "apache-2.0"
    if kind == "model" and not Path(name).is_dir() and not is_hub_id(str(name)):
        return None  # a folder's name in a record: on the Hub it would be somebody else's
    card = Path(name) / "README.md" if Path(name).is_dir() else name
    reader: Any = {"model": ModelCard, "dataset": DatasetCard}[kind]
    try:
        stated = reader.load(card, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):  # no card, no line, or no metadata in it
        return None
    return stated if isinstance(stated, str) else None


def eval_results(results: Sequence[RobustnessResult]) -> list[EvalResult]:
    """The rows of `model-index`: clean accuracy once per dataset, robust accuracy with its attacks per radius."""
    rows: list[EvalResult] = []
    told = set()
    for result in results:
        group = "" if result.group == "all" else f", {result.group} classes"
        if (what := (result.task, result.metric, result.dataset, result.split, result.group)) not in told:
            told.add(what)
            rows.append(_index_row(result, "clean", f"Clean {result.metric}{group}", {}))
        attack: dict[str, Any] = {"protocol": result.protocol, "norm": result.norm, "eps": result.eps}
        attack |= {"severity": result.severity} if result.severity is not None else {}
        # What is None is not written to YAML, and would not come back.
        attack["attacks"] = [{key: value for key, value in row.items() if value is not None} for row in result.attacks]
        rows.append(_index_row(result, "robust", f"Robust {result.metric} ({result.threat}{group})", attack))
    return rows


def _index_row(result: RobustnessResult, kind: str, name: str, attack: dict[str, Any]) -> EvalResult:
    task = _TASKS.get(result.task, result.task.replace("_", "-"))
    metric, accuracy = result.metric.replace(" ", "_"), f"{kind}_accuracy"
    size = {"group": result.group, "num_samples": result.num_samples, "ci95": result.ci95[accuracy]}
    return EvalResult(
        task_type=task,
        task_name=task.replace("-", " ").capitalize(),
        dataset_type=result.dataset,
        dataset_name=result.dataset,
        dataset_split=result.split,
        metric_type=metric if kind == "clean" else f"robust_{metric}",
        metric_name=name,
        metric_value=getattr(result, accuracy),
        metric_args=attack | size,
    )


def headline(results: Sequence[RobustnessResult]) -> str:
    """The one line of numbers that a reader takes away: clean, and at the largest radius of the first data."""
    first, rows = hardened(results)[0], like_the_first(results)

    def told(rows: Sequence[RobustnessResult]) -> str:
        worst = max(rows, key=lambda row: row.level)
        return f"{percent(worst.clean_accuracy)} clean, {percent(worst.robust_accuracy)} at {worst.threat}"

    what = axes_of(first)[1].removesuffix(", %")
    data = f"{first.dataset} ({first.split}, {counted(first.num_samples, 'sample')})"
    text = f"On {data}, {what}: {told(hardened(rows))}."
    before = [row for row in rows if row.model == "before"]
    return f"{text} The original: {told(before)}." if before else text


def like_the_first(results: Sequence[RobustnessResult]) -> list[RobustnessResult]:
    """The results of the first data and protocol that the hardened model was measured on, at all radii."""

    def way(row: RobustnessResult) -> tuple[Any, ...]:
        return row.task, row.metric, row.dataset, row.split, row.group, row.protocol, row.norm

    return [row for row in results if way(row) == way(hardened(results)[0])]


def _row(result: RobustnessResult, first: RobustnessResult) -> list[Any]:
    """Of the table: what differs from the first row's metric and data is named."""
    attack = f"{result.protocol}, {result.threat}"
    if (result.metric, result.dataset) != (first.metric, first.dataset):
        attack += f" ({result.metric} on {result.dataset})"
    return [result.model, attack, point(result, "clean"), point(result, "robust"), result.num_samples]
