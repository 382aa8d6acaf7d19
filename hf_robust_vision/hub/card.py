"""The model card: the measured numbers, how they were measured, and how the model was trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CardData, EvalResult, ModelCard, ModelCardData

from hf_robust_vision.evaluation.consistency import check_attacked, check_results
from hf_robust_vision.evaluation.results import RobustnessResult, write_atomically
from hf_robust_vision.report import protocol
from hf_robust_vision.report.escape import markdown, markdown_code
from hf_robust_vision.report.tables import accuracy, markdown_table, training_settings

from .usage import usage_block


# The last one lists everything that this package published: `HfApi().list_models(filter="hf-robust-vision")`.
TAGS = ("adversarial-robustness", "clip", "robust-vision-encoder", "hf-robust-vision")

# Library, task and relation to the original: what makes the Hub list a repository, and offer the right lines for it.
_KINDS = {
    "model": ("transformers", "zero-shot-image-classification", "finetune"),
    "tower": ("transformers", "image-feature-extraction", "finetune"),
    "adapter": ("peft", "zero-shot-image-classification", "adapter"),
}

# Task of a result -> task of the Hub.
_TASKS = {
    "zero_shot": "zero-shot-image-classification",
    "corruption": "zero-shot-image-classification",
    "vqa": "visual-question-answering",
    "caption": "image-to-text",
}


def make_card(
    results: Sequence[RobustnessResult],
    *,
    model_name: str,
    base_model: str | None = None,
    dataset: str | None = None,
    tags: Sequence[str] = (),
    picture: str | None = None,
    license: str | None = None,
    paper: str | None = None,
) -> ModelCard:
    """A card whose table and `model-index` hold the same numbers as `robustness.json`.

    Args:
        results: Of the hardened model (`model="after"`) and, beside them, of the original (`model="before"`).
        model_name: Title.
        base_model: Hub id of the original. A mere folder name is told in the text only: as metadata it would link to
            somebody else's model, or to none.
        dataset: Hub id of the fine-tuning data; None where it is not on the Hub.
        tags: More tags, such as the method.
        picture: File name of the curve beside the card.
        license: Such as "apache-2.0" or "mit".
        paper: arXiv number of the method.

    Raises:
        ValueError: If there is no result of the hardened model, or one that no attack was made for.
    """
    after = hardened(results)
    for result in results:
        check_attacked(result)
    if not after:
        raise ValueError("a card needs at least one measured result of the hardened model.")
    data = ModelCardData(
        model_name=model_name,
        license=license,
        tags=[*TAGS, *tags],
        datasets=[dataset] if dataset else None,
        eval_results=eval_results(after),
    )
    set_kind(data, "model", base_model)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(results, model_name, base_model, picture, paper)}")


def set_kind(data: CardData, kind: str, base_model: str | None) -> None:
    """Say in a card's metadata what the repository holds ("model", "tower" or "adapter") and what it was made from."""
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
    """Write `README.md` into a model folder; the settings are those of `make_card`.

    Raises:
        ValueError: As `make_card`, or if the samples files of the folder say something else than the results.
    """
    check_results(results, folder)
    path = Path(folder) / "README.md"
    write_atomically(path, str(make_card(results, **settings)))
    return path


def results_table(results: Sequence[RobustnessResult]) -> str:
    """Clean and robust accuracy of each model at each radius, with 95 % intervals, as Markdown."""
    rows = []
    for result in results:
        attack = f"{result.protocol}, {result.threat}"
        if (result.metric, result.dataset) != (results[0].metric, results[0].dataset):
            attack += f" ({result.metric} on {result.dataset})"
        rows.append([result.model, attack, accuracy(result, "clean"), accuracy(result, "robust"), result.num_samples])
    return markdown_table(["model", "attack", "clean", "robust", "samples"], rows)


def eval_results(results: Sequence[RobustnessResult]) -> list[EvalResult]:
    """The rows of `model-index`: clean accuracy once per dataset, robust accuracy with its attacks per radius."""
    rows: list[EvalResult] = []
    told = set()
    for result in results:
        task = _TASKS.get(result.task, result.task.replace("_", "-"))
        about: dict[str, Any] = {
            "task_type": task,
            "task_name": task.replace("-", " ").capitalize(),
            "dataset_type": result.dataset,
            "dataset_name": result.dataset,
            "dataset_split": result.split,
        }
        kind = result.metric.replace(" ", "_")
        group = "" if result.group == "all" else f", {result.group} classes"
        size: dict[str, Any] = {"group": result.group, "num_samples": result.num_samples}
        if (what := (result.task, result.metric, result.dataset, result.split, result.group)) not in told:
            told.add(what)
            rows.append(
                EvalResult(
                    **about,
                    metric_type=kind,
                    metric_name=f"Clean {result.metric}{group}",
                    metric_value=result.clean_accuracy,
                    metric_args=size | {"ci95": result.ci95["clean_accuracy"]},
                )
            )
        attack = {"protocol": result.protocol, "norm": result.norm, "eps": result.eps}
        attack |= {"severity": result.severity} if result.severity is not None else {}
        # What is None is not written to YAML, and would not come back.
        attacks = [{key: value for key, value in row.items() if value is not None} for row in result.attacks]
        rows.append(
            EvalResult(
                **about,
                metric_type=f"robust_{kind}",
                metric_name=f"Robust {result.metric} ({result.threat}{group})",
                metric_value=result.robust_accuracy,
                metric_args=attack | size | {"ci95": result.ci95["robust_accuracy"], "attacks": attacks},
            )
        )
    return rows


def _body(
    results: Sequence[RobustnessResult],
    model_name: str,
    base_model: str | None,
    picture: str | None,
    paper: str | None,
) -> str:
    after = hardened(results)
    training = next((result.training for result in after if result.training), {})
    tuned = "vision tower was" if training.get("text_params", "none") == "none" else "vision and text towers were"
    method = markdown(training.get("method", "an unknown method"))
    method = f"[{method}](https://arxiv.org/abs/{paper})" if paper else method
    made_from = f" made from {markdown_code(base_model)}" if base_model else ""
    terms = f" ({markdown_code(base_model)})" if base_model else ""
    settings = next((training_settings(result) for result in after if result.training), [])
    image = f"![Accuracy over eps]({picture})\n\n" if picture else ""
    measured = "\n\n".join(_measured(table) for table in protocol.grouped((result, result) for result in after))
    how = "\n".join(f"- {markdown(key)}: {markdown(value)}" for key, value in settings) or "Not recorded."
    return f"""# {markdown(model_name)}

A `CLIPModel`{made_from}: its {tuned} fine-tuned against adversarial images ({method}). It loads without any extra package:

{usage_block("model", ".", after[0], base_model)}

## Measured robustness

{results_table(results)}

{image}Attacks are white-box through normalisation unless they say otherwise; the worst case counts for each sample. The
intervals are 95 %. Every sample's outcome lies in the `samples-*.jsonl` files, the full protocol in `robustness.json`.

{measured}

## Training

{how}

## Limits

The numbers hold for this data, these attacks and these radii; a stronger attack can only lower the robust ones.
Zero-shot robustness does not show how a vision-language model with this tower behaves: measure the model that you
deploy. The terms of the original{terms} hold for what was made from it.
"""


def _measured(table: Sequence[RobustnessResult]) -> str:
    """How the results of one table were measured: the data, the attacks at each radius, and what was left out."""
    labelled = [(result.model, result) for result in table]
    parts = [f"**{markdown(protocol.heading(table[0]))}.** {markdown(protocol.about(table[0]))}"]
    if table[0].attacks:
        parts.append(markdown_table(*protocol.attack_table(labelled)))
    return "\n\n".join([*parts, *map(markdown, protocol.notes(labelled))])
