"""Captions under an attack on the loss of the reference captions, scored by n-grams."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn
from typing_extensions import Unpack, override

from hf_robust_vision.attacks import Objective
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, summarize_scores
from hf_robust_vision.evaluation.task import Batch, Level, RobustnessProtocol, Stage, Verdict

from .answers import AnswerLoss
from .vlm import Sample, VLMProtocol, VLMSettings, VLMTask, evaluate_vlm


@dataclass(frozen=True)
class CaptionMetric:
    """How a caption is scored, on its own."""

    name: str  # what results call it
    score: Callable[[str, Sequence[str]], float]  # of a caption and its references: a fraction, 1 for the best
    # What else decides the score, for the results. Records on disk are used again only for the same settings and the
    # same source text of `score`: one that reads other values has to name them here.
    settings: dict[str, str] = field(default_factory=dict)

    def identity(self) -> dict[str, str]:
        """Name, hash of the source text of `score`, and settings: what decides whether a record may be used again."""
        code: Any = self.score if inspect.isroutine(self.score) else type(self.score)
        try:
            source = inspect.getsource(code)
        except (OSError, TypeError):  # typed at a prompt, or written in C
            source = f"{code.__module__}.{code.__qualname__}"
        return {"name": self.name, "source": hashlib.sha256(source.encode()).hexdigest(), **self.settings}


def chrf() -> CaptionMetric:
    """ChrF2 of sacrebleu: F-score of character n-grams up to 6, recall counting twice.

    Reference:
        Popović 2015, https://aclanthology.org/W15-3049.
    """
    return _sacrebleu("chrF2", "CHRF")


def bleu() -> CaptionMetric:
    """BLEU-4 of sacrebleu, of one sentence: orders that a short caption does not have are left out.

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


@dataclass
class Captions(VLMTask):
    """How good is the caption still?

    Every attack raises the loss of one reference caption; then the model captions the attacked image, greedily. A
    sample counts with the worst score over all attacks, the smaller radii and the clean image.

    Raises:
        ValueError: As `VLMTask`; or if a sample has no reference caption, or none is to be attacked.
        ModuleNotFoundError: If the default metric's library is not installed; the message is the line to type.
    """

    scored: CaptionMetric = field(default_factory=chrf)
    attacked_references: int = 1
    max_new_tokens: int = 64
    kind = task = "caption"
    compares_with_clean = True
    counts_survivors = False  # a caption is attacked to the last, whoever brought its worst score

    def __post_init__(self) -> None:
        super().__post_init__()
        self.metric = self.scored.name
        bare = [sample.id for sample in self.samples if not sample.references or isinstance(sample.references, str)]
        if bare:
            raise ValueError(f"samples {bare[:3]} have no list of reference captions.")
        if self.attacked_references < 1:
            raise ValueError(f"attacked_references must be at least 1, got {self.attacked_references}.")

    @override
    def label(self, place: int) -> str:
        return "\n".join(self.samples[place].references)

    @override
    def judge(self, batch: Batch, images: Tensor) -> list[Verdict]:
        verdicts = []
        for place, text in zip(batch.places, self.say(batch, images, self.max_new_tokens)):
            score = self.scored.score(text, self.samples[place].references)
            if not 0 <= score <= 1:
                raise ValueError(f"{self.scored.name} must give a score from 0 to 1, got {score} for {text!r}.")
            verdicts.append(Verdict(text, score <= 0, -score, round(score, 6)))
        return verdicts

    @override
    def stands(self, record: SampleRecord, stage: Stage) -> bool:
        return record.score is not None and record.score > 0

    @override
    def blame(self, stage: Stage, verdict: Verdict, record: SampleRecord) -> str | None:
        lower = record.score is not None and verdict.score is not None and verdict.score < record.score
        return stage.attack.name if lower else record.fooled_by

    def levels(self, how: RobustnessProtocol) -> list[Level]:
        """Every attack on one reference after the other."""
        levels = []
        for level in super().levels(how):
            aims = [(a, place) for place in range(self.attacked_references) for a in level.attacks]
            stages = [Stage(replace(a, name=f"{a.name}-ref{place}"), level.ball, place) for a, place in aims]
            attacks = tuple(stage.attack for stage in stages)
            levels.append(replace(level, stages=tuple(stages) if level.value > 0 else (), attacks=attacks))
        return levels

    def aim(self, stage: Stage, batch: Batch) -> tuple[Objective, None]:
        """Raise the loss of one reference caption, to the last step."""
        references = [self.samples[place].references for place in batch.places]
        # Who has fewer references meets the first ones again: every sample gets the same budget.
        texts = [own[stage.target % len(own)] for own in references]
        return AnswerLoss(self.answers(batch, texts), stage.attack.objective), None

    @override
    def identity(self) -> dict[str, Any]:
        own = {"score": self.scored.identity(), "references": [list(sample.references) for sample in self.samples]}
        return super().identity() | own | {"attacked": self.attacked_references, "tokens": self.max_new_tokens}

    @override
    def decoding(self) -> dict[str, Any]:
        metric = {"name": self.scored.name, **self.scored.settings}
        return super().decoding() | {"max_new_tokens": self.max_new_tokens, "metric": metric}

    @override
    def summary(self, metric: str, records: Sequence[SampleRecord]) -> dict[str, Any]:
        return summarize_scores(records)


class CaptionSettings(VLMSettings, total=False):
    """As `VLMSettings`, and how captions are made, attacked and scored."""

    metric: CaptionMetric | None  # by default `chrf()`
    attacked_references: int  # of each sample, one after the other; by default one
    max_new_tokens: int  # 64 unless told otherwise


def evaluate_captions(
    vlm: nn.Module, processor: Any, samples: Sequence[Captioned], how: VLMProtocol, **settings: Unpack[CaptionSettings]
) -> list[RobustnessResult]:
    """Mean score of generated captions on clean and on attacked images, one result per eps.

    `clean_accuracy` and `robust_accuracy` of the results are these means, as fractions, with normal 95 % intervals. Of
    `how`, `objectives=("nll",)` is the published attack. All else is as for `evaluate_vqa`; see `Captions`.

    Reference:
        Schlarmann et al. 2024, https://huggingface.co/papers/2402.12336, section 4.1.

    Deviation: one precision and one kind of start for all attacks, where the reference goes from half to single
        precision, and from the clean image; its CIDEr needs corpus statistics and Java.
    """
    own: dict[str, Any] = {**settings}
    own["scored"] = own.pop("metric", None) or chrf()
    return evaluate_vlm(Captions, (vlm, processor, samples), how, own)
