"""Captions under an attack on the loss of the reference captions, scored by n-grams."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from hf_robust_vision.attacks import Attack, Objective, Success
from hf_robust_vision.evaluation.results import RobustnessResult, summarize_scores
from hf_robust_vision.towers.vlm_inputs import VLMInputs

from .answers import AnswerLoss, answer_task, say
from .protocol import VLMProtocol
from .run import Evaluation, Sample, Verdict


@dataclass(frozen=True)
class CaptionMetric:
    """How a caption is scored, on its own.

    Args:
        name: What results call it.
        score: A caption and its references to a fraction in [0, 1], 1 for the best.
        settings: What else decides the score, for the results. Records on disk are used again only for the same
            settings and the same source text of `score`; a score that reads other values has to name them here.
    """

    name: str
    score: Callable[[str, Sequence[str]], float]
    settings: dict[str, str] = field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        """What tells this metric from others of its name."""
        code: Any = self.score if inspect.isroutine(self.score) else type(self.score)
        try:
            source = inspect.getsource(code)
        except (OSError, TypeError):  # typed at a prompt, or written in C
            source = f"{code.__module__}.{code.__qualname__}"
        return {"name": self.name, "source": hashlib.sha256(source.encode()).hexdigest(), **self.settings}


def chrf() -> CaptionMetric:
    """ChrF2 of sacrebleu: F-score of character n-grams up to 6, recall counting twice.

    Raises:
        ModuleNotFoundError: If sacrebleu is not installed; the message is the line to type.

    Reference:
        Popović 2015, https://aclanthology.org/W15-3049.
    """
    return _sacrebleu("chrF2", "CHRF")


def bleu() -> CaptionMetric:
    """BLEU-4 of sacrebleu, of one sentence: orders that a short caption does not have are left out.

    Raises:
        ModuleNotFoundError: If sacrebleu is not installed; the message is the line to type.

    Reference:
        Papineni et al. 2002, https://aclanthology.org/P02-1040.
    """
    return _sacrebleu("BLEU-4", "BLEU", lowercase=True, effective_order=True)


def _sacrebleu(name: str, kind: str, **settings: Any) -> CaptionMetric:
    try:
        import sacrebleu
    except ImportError as error:
        raise ModuleNotFoundError(f'{name} needs sacrebleu: pip install "hf-robust-vision[caption]"') from error
    metric = getattr(sacrebleu.metrics, kind)(**settings)

    def score(caption: str, references: Sequence[str]) -> float:
        return float(metric.sentence_score(caption, list(references)).score / 100)

    return CaptionMetric(name, score, {"sacrebleu": sacrebleu.__version__} | {k: str(v) for k, v in settings.items()})


class Captioned(Sample, Protocol):
    """An image with at least one reference caption; `text` may be empty."""

    references: Sequence[str]


class WorseCaption:
    """The goal: a caption of a low score."""

    def __init__(
        self,
        inputs: VLMInputs,
        prompt: str,
        samples: Sequence[Captioned],
        images: Tensor,
        metric: CaptionMetric,
        attacks: Sequence[Attack],
        max_new_tokens: int,
    ):
        self.inputs, self.samples, self.metric, self.max_new_tokens = inputs, samples, metric, max_new_tokens
        prompts = [prompt.replace("{}", sample.text) for sample in samples]
        height, width = images.shape[-2:]
        self.prompts = inputs.encode(prompts, (height, width))
        self.tasks = {}
        for attack in attacks:
            place = _reference(attack)
            texts = [sample.references[place % len(sample.references)] for sample in samples]
            self.tasks[attack.name] = answer_task(inputs, prompts, texts, (height, width))

    def label(self, row: int) -> str:
        """The reference captions, one a line."""
        return "\n".join(self.samples[row].references)

    def aim(self, attack: Attack, rows: Tensor) -> tuple[Objective, Success | None]:
        """Raise the loss of one reference caption, to the last step."""
        return AnswerLoss(self.tasks[attack.name].take(rows), attack.objective), None

    def judge(self, rows: Tensor, images: Tensor) -> list[Verdict]:
        """What `generate` says, and its score."""
        places = rows.tolist()
        texts = say(self.inputs, [self.prompts[row] for row in places], images, self.max_new_tokens)
        scores = [self.metric.score(text, self.samples[row].references) for row, text in zip(places, texts)]
        return [Verdict(text, score <= 0, round(score, 6)) for text, score in zip(texts, scores)]


def evaluate_captions(
    vlm: nn.Module,
    processor: Any,
    samples: Sequence[Captioned],
    how: VLMProtocol,
    *,
    prompt: str,
    model_name: str,
    dataset: str,
    split: str,
    metric: CaptionMetric | None = None,
    group: str = "all",
    attacked_references: int = 1,
    max_new_tokens: int = 64,
    samples_dir: str | Path | None = None,
    progress: bool = True,
) -> list[RobustnessResult]:
    """Mean score of generated captions on clean and on attacked images, one result per eps.

    Every attack raises the loss of one reference caption; then the model captions the attacked image, greedily. A
    sample counts with the worst score over all attacks, the smaller radii and the clean image. `clean_accuracy` and
    `robust_accuracy` of the results are these means, as fractions, with normal 95 % intervals.

    Args:
        vlm: As in `evaluate_vqa`.
        processor: As in `evaluate_vqa`.
        samples: Images with their reference captions.
        how: Attacks and radii; `objectives=("nll",)` is the published attack.
        prompt: With the image token, and "{}" for a sample's text, if it is to have one.
        model_name: "before", "after" or a path.
        dataset: Name of the data.
        split: Of the data.
        metric: How captions are scored, by default `chrf()`.
        group: Which samples these are.
        attacked_references: How many references of a sample are attacked, one after the other.
        max_new_tokens: Of a caption.
        samples_dir: Folder for `samples-*.jsonl`.
        progress: Show a bar.

    Raises:
        TypeError: As in `evaluate_vqa`.
        ValueError: As in `evaluate_vqa`; or if a sample has no reference caption, or none is to be attacked.
        ModuleNotFoundError: If the default metric's library is not installed.

    Reference:
        Schlarmann et al. 2024, https://huggingface.co/papers/2402.12336, section 4.1.

    Deviation: one precision and one kind of start for all attacks, where the reference goes from half to single
        precision, and from the clean image; its CIDEr needs corpus statistics and Java.
    """
    metric = metric if metric is not None else chrf()
    bare = [sample.id for sample in samples if not sample.references or isinstance(sample.references, str)]
    if bare:
        raise ValueError(f"samples {bare[:3]} have no list of reference captions.")
    if attacked_references < 1:
        raise ValueError(f"attacked_references must be at least 1, got {attacked_references}.")
    attacks = [
        replace(attack, name=f"{attack.name}-ref{place}")
        for place in range(attacked_references)
        for attack in how.attacks()
    ]
    run = Evaluation(
        vlm,
        processor,
        samples,
        how,
        prompt,
        model_name,
        dataset,
        split,
        group,
        samples_dir=samples_dir,
        progress=progress,
    )
    shared = {"max_new_tokens": max_new_tokens, "metric": {"name": metric.name, **metric.settings}}
    return run.run(
        lambda inputs, rows, images: WorseCaption(inputs, prompt, rows, images, metric, attacks, max_new_tokens),
        kind="caption",
        attacks=attacks,
        identity=shared
        | {
            "score": metric.identity(),
            "references": [list(sample.references) for sample in samples],
            "attacked": len(attacks),
        },
        summary=summarize_scores,
        task="caption",
        metric=metric.name,
        generation=shared | {"prompt": prompt, "decoding": "greedy"},
    )


def _reference(attack: Attack) -> int:
    return int(attack.name.rpartition("-ref")[2])
