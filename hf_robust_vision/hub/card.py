"""The model card: the measured numbers, how they were measured, and how the model was trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from hf_robust_vision.evaluation.results import RobustnessResult, pretty_eps, write_atomically


TAGS = ("adversarial-robustness", "clip", "robust-vision-encoder")


def make_card(
    results: Sequence[RobustnessResult],
    *,
    model_name: str,
    base_model: str | None = None,
    dataset: str | None = None,
    tags: Sequence[str] = (),
    picture: str | None = None,
) -> ModelCard:
    """A card whose table and `model-index` hold the same numbers as `robustness.json`.

    Args:
        results: Of the hardened model (`model="after"`) and, beside them, of the original (`model="before"`).
        model_name: Title.
        base_model: Folder name or Hub id of the original.
        dataset: Name of the fine-tuning data.
        tags: More tags, such as the method.
        picture: File name of the curve beside the card.

    Raises:
        ValueError: If there is no result of the hardened model.
    """
    after = [result for result in results if result.model != "before"]
    if not after:
        raise ValueError("a card needs at least one measured result of the hardened model.")
    data = ModelCardData(
        model_name=model_name,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
        tags=[*TAGS, *tags],
        base_model=base_model,
        datasets=[dataset] if dataset else None,
        eval_results=_eval_results(after),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(results, after, model_name, base_model, picture)}")


def write_card(folder: str | Path, results: Sequence[RobustnessResult], **settings: Any) -> Path:
    """Write `README.md` into a model folder; the settings are those of `make_card`."""
    path = Path(folder) / "README.md"
    write_atomically(path, str(make_card(results, **settings)))
    return path


def results_table(results: Sequence[RobustnessResult]) -> str:
    """Clean and robust accuracy of each model at each radius, with 95 % intervals, as Markdown."""
    lines = ["| model | attack | clean | robust | samples |", "|---|---|---|---|---|"]
    for result in results:
        clean, robust = (_percent(result, name) for name in ("clean_accuracy", "robust_accuracy"))
        attack = f"{result.protocol}, {result.norm} {pretty_eps(result)}"
        lines.append(f"| {result.model} | {attack} | {clean} | {robust} | {result.num_samples} |")
    return "\n".join(lines)


def _percent(result: RobustnessResult, name: str) -> str:
    low, high = result.ci95[name]
    return f"{100 * getattr(result, name):.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _eval_results(results: Sequence[RobustnessResult]) -> list[EvalResult]:
    rows: list[EvalResult] = []
    for result in results:
        dataset: dict[str, Any] = {
            "dataset_type": result.dataset,
            "dataset_name": result.dataset,
            "dataset_split": result.split,
        }
        task: dict[str, Any] = {
            "task_type": "zero-shot-image-classification",
            "task_name": "Zero-shot image classification",
        }
        arguments = {"protocol": result.protocol, "norm": result.norm, "eps": result.eps, "attacks": result.attacks}
        if not rows:
            rows.append(
                EvalResult(
                    **task,
                    **dataset,
                    metric_type="accuracy",
                    metric_name="Clean accuracy",
                    metric_value=result.clean_accuracy,
                )
            )
        rows.append(
            EvalResult(
                **task,
                **dataset,
                metric_type="robust_accuracy",
                metric_name=f"Robust accuracy ({result.norm}, {pretty_eps(result)})",
                metric_value=result.robust_accuracy,
                metric_args=arguments,
            )
        )
    return rows


def _body(
    results: Sequence[RobustnessResult],
    after: Sequence[RobustnessResult],
    model_name: str,
    base_model: str | None,
    picture: str | None,
) -> str:
    first = after[0]
    training = first.training or {}
    how = "\n".join(f"- {key}: {value}" for key, value in training.items())
    attacks = "; ".join(f"{a['name']}: {a['steps']} steps, {a['restarts']} restarts" for a in first.attacks)
    image = f"![Accuracy over eps]({picture})\n\n" if picture else ""
    tuned = "vision tower was" if training.get("text_params", "none") == "none" else "vision and text towers were"
    return f"""# {model_name}

A `CLIPModel` whose {tuned} fine-tuned against adversarial images
({training.get("method", "unknown method")}; original: `{base_model}`). It loads without any extra package:

```python
from transformers import CLIPModel

model = CLIPModel.from_pretrained(".")  # or the id of this repository
```

## Measured robustness

{results_table(results)}

{image}White-box attacks through normalisation, worst case per sample, on the {first.split} split of {first.dataset}
({first.num_samples} images, {len(first.class_names)} classes, {len(first.templates)} prompt templates, hash
`{first.template_hash}`). First radius: {attacks}. 95 % Wilson intervals. Every sample's outcome lies in the
`samples-*.jsonl` files, the full protocol in `robustness.json`.

## Training

{how}

## Limits

The numbers hold for this data, these attacks and these radii. Zero-shot robustness does not show how a
vision-language model with this tower behaves: measure the model that you deploy.
"""
