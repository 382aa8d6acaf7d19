"""What a measurement of robustness is: numbers with their protocol, and one line a sample behind them."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_robust_vision import __version__
from hf_robust_vision.files import from_plain, read_json, read_text, write_atomically


SCHEMA = 1
RESULTS_FILE = "robustness.json"


@dataclass
class SampleRecord:
    """One line of a samples file."""

    id: int | str
    label: int | str  # true class, true answer of a question, reference captions, or an attacker's target
    clean: int | str  # output on the clean image
    adversarial: int | str | None = None  # on the adversarial one; None where none was made (a sample already wrong)
    # Highest logit minus the true class's on the adversarial image, at least 0 where the attack won; of a caption its
    # worst score in [0, 1].
    score: float | None = None
    # Name of the attack that won (of a caption: that brought the worst score), None for none; "clean" for a sample that
    # was lost before.
    fooled_by: str | None = None
    clean_score: float | None = None  # of the caption of the clean image

    @property
    def clean_hit(self) -> bool:
        """Is the output on the clean image right?"""
        return self.fooled_by != "clean"

    @property
    def robust_hit(self) -> bool:
        """Is it right under every attack?"""
        return self.fooled_by is None


@dataclass
class RobustnessResult:
    """Clean and robust accuracy of one model on one dataset under one protocol at one eps.

    Accuracies are fractions in [0, 1]. A Linf eps is in pixels in [0, 1], an L2 eps a Euclidean radius over the
    [0, 1] image; a corruption has a severity instead, the norm "none" and an eps of 0. `carry` says whether a sample
    that fell at a smaller radius counts as fallen here. Two metrics are no accuracies: of captions both values are mean
    scores, and under "targeted_success" they are the shares of images on which the attacker's target is not said;
    `attack_success` then holds the attacker's own rates, "clean" (the control) and "attacked".

    Raises:
        ValueError: If a number can not be: not finite, not in its range, or of no sample.
    """

    task: str
    model: str
    model_sha256: str
    dataset: str
    split: str
    num_samples: int
    clean_accuracy: float
    robust_accuracy: float
    protocol: str
    eps: float
    norm: str
    attacks: list[dict[str, Any]]
    dataset_id: str | None = None  # owner/name of a data set of the Hub, whatever `dataset` calls it
    severity: int | None = None
    metric: str = "accuracy"
    group: str = "all"
    class_names: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=list)
    template_hash: str | None = None
    logit_scale: float | None = None
    ci95: dict[str, list[float]] = field(default_factory=dict)
    training: dict[str, Any] | None = None
    generation: dict[str, Any] | None = None
    sanity: dict[str, Any] | None = None
    attack_success: dict[str, float] | None = None
    left_out: list[str] = field(default_factory=list)
    carry: bool = True
    samples: str | None = None
    images: str | None = None
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.norm == "severity":  # kept as a radius by earlier versions
            self.severity, self.eps, self.norm = int(self.eps), 0.0, "none"
        for name, value in (("clean_accuracy", self.clean_accuracy), ("robust_accuracy", self.robust_accuracy)):
            bounds = self.ci95.get(name, [])
            if not 0 <= value <= 1 or len(bounds) != 2 or not 0 <= bounds[0] <= bounds[1] <= 1:
                raise ValueError(f"{name} and its ci95 must be in [0, 1], got {value} and {bounds}.")
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}: nothing was measured.")
        if not 0 <= self.eps < math.inf or (self.norm == "linf" and self.eps > 1):
            raise ValueError(f"eps must be a radius over pixels in [0, 1], got {self.eps}.")
        for file in (self.samples, self.images):
            if file is not None and (file in ("", ".", "..") or set(file) & set("/\\\0")):
                raise ValueError(f"samples and images must be names in the results' own folder, got {file!r}.")
        if not all(isinstance(row.get("name"), str) for row in self.attacks):
            raise ValueError("an attack has no name.")

    @property
    def robust_name(self) -> str:
        """What trackers call the robust accuracy at this radius: "robust_accuracy_4_255", or "robust_accuracy_l2_0.5"."""
        return f"robust_accuracy_{self.threat.removeprefix('linf ').replace('/', '_').replace(' ', '_')}"

    @property
    def threat(self) -> str:
        """What the robust accuracy holds against: "linf 4/255", "l2 0.5", or "severity 3"."""
        return pretty_eps(self) if self.severity is not None else f"{self.norm} {pretty_eps(self)}"

    @property
    def level(self) -> float:
        """Where the result lies on the axis of a curve: the radius, in 255ths if it is an Linf one, or the severity."""
        return self.severity if self.severity is not None else self.eps * (255 if self.norm == "linf" else 1)

    @property
    def run(self) -> tuple[Any, ...]:
        """What the results of one measurement share: they differ in their radius or severity only."""
        data = (self.task, self.metric, self.dataset, self.split, self.group)
        return *data, self.model, self.model_sha256, self.protocol, self.norm

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `robustness.json` holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any, where: str = "a result") -> RobustnessResult:
        """Read what `to_dict` wrote, now or in an earlier version; see `from_plain`."""
        if isinstance(values, dict):  # earlier versions did not say it; one protocol of theirs did not carry
            values = {"carry": values.get("protocol") != "tecoa"} | values
        return from_plain(cls, values, where)


def summarize_hits(clean: Sequence[bool], robust: Sequence[bool]) -> dict[str, Any]:
    """Sample count, both accuracies and their Wilson intervals over one flag a sample."""
    return _summary(clean, robust, lambda hits: wilson_interval(sum(hits), len(hits)))


def summarize_scores(records: Sequence[SampleRecord]) -> dict[str, Any]:
    """Mean scores on clean and on attacked images with normal 95 % intervals."""
    scores = [(r.clean_score, r.score) for r in records if r.clean_score is not None and r.score is not None]
    if len(scores) < len(records):
        raise ValueError("a record has no scores: there is nothing to average.")
    return _summary([clean for clean, _ in scores], [robust for _, robust in scores], _mean_interval)


def _summary(
    clean: Sequence[float], robust: Sequence[float], interval: Callable[[Sequence[float]], tuple[float, float]]
) -> dict[str, Any]:
    if not clean:
        raise ValueError("nothing was measured: there are no records.")
    columns = {"clean_accuracy": clean, "robust_accuracy": robust}
    means = {name: statistics.fmean(column) for name, column in columns.items()}
    return {"num_samples": len(clean), **means, "ci95": {k: list(interval(v)) for k, v in columns.items()}}


def _mean_interval(values: Sequence[float], z: float = 1.959963984540054) -> tuple[float, float]:
    if len(values) < 2:
        return 0.0, 1.0
    mean, half = statistics.fmean(values), z * statistics.stdev(values) / math.sqrt(len(values))
    return max(0.0, mean - half), min(1.0, mean + half)


def wilson_interval(hits: float, count: float, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion; (0, 1) of nothing.

    Reference:
        Wilson 1927, Journal of the American Statistical Association 22.
    """
    if count == 0:
        return 0.0, 1.0
    # Not the normal interval, which has no width where all samples fall or none does.
    share, weight = hits / count, z * z / count
    centre = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / count + weight / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def save_results(results: Iterable[RobustnessResult], folder: str | Path) -> Path:
    """Write `robustness.json` into a folder, whole or not at all."""
    path = Path(folder) / RESULTS_FILE
    content = {"schema": SCHEMA, "results": [_finite(result.to_dict()) for result in results]}
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def _finite(values: Any) -> Any:
    """Plain values with None for what is not finite: JSON has no word for it, and a sanity check may have seen it."""
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [_finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def add_results(results: Sequence[RobustnessResult], folder: str | Path) -> Path:
    """Write results into a folder's `robustness.json` beside those that it holds.

    A result of the same weights, data, protocol name and radius takes the place of the older one.
    """
    path = Path(folder) / RESULTS_FILE
    kept = load_results(path) if path.is_file() else []
    # The level, not eps: severities all have an eps of 0.
    new = {(result.run, result.level) for result in results}
    return save_results([*(result for result in kept if (result.run, result.level) not in new), *results], folder)


def load_results(path: str | Path) -> list[RobustnessResult]:
    """Read a `robustness.json`, or the one in a folder.

    Raises:
        ValueError: If it is none, or has a schema that this version does not read; or as `from_plain`.
    """
    path = Path(path)
    path = path / RESULTS_FILE if path.is_dir() else path
    content = read_json(read_text(path), path)
    if not isinstance(content, dict) or not isinstance(content.get("results"), list):
        raise ValueError(f'{path} is no {RESULTS_FILE}: it must hold an object with a list "results".')
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{path} has schema {content.get('schema')!r}, this version reads {SCHEMA}.")
    return [RobustnessResult.from_dict(row, f"{path}: result {n}") for n, row in enumerate(content["results"], 1)]


def check_results_file(folder: str | Path) -> None:
    """Refuse a folder whose `robustness.json` could not be added to: good to know before hours of measuring."""
    if (Path(folder) / RESULTS_FILE).exists():
        load_results(folder)


def load_samples(path: str | Path) -> list[SampleRecord]:
    """Read a samples file; a line that stands twice counts once, and two that contradict each other are refused."""
    path, found = Path(path), dict[int | str, SampleRecord]()
    for number, line in enumerate(read_text(path).splitlines(), 1):
        where = f"{path}, line {number}"
        record = from_plain(SampleRecord, read_json(line, where), where)
        if found.setdefault(record.id, record) != record:
            raise ValueError(f"{where} says something else about sample {record.id!r} than a line before it.")
    return list(found.values())


def pretty_eps(result: RobustnessResult) -> str:
    """The radius as `eps_text` says it, or the severity of a corruption."""
    return f"severity {result.severity}" if result.severity is not None else eps_text(result.eps, result.norm)


def eps_text(eps: float, norm: str) -> str:
    """A Linf radius in 255ths, an L2 radius as it is."""
    return f"{eps * 255:g}/255" if norm == "linf" else f"{eps:g}"


def tracked_metrics(results: Iterable[RobustnessResult]) -> dict[str, float]:
    """A run's end for trackers: `test_clean_accuracy`, `test_robust_accuracy_4_255`, or `test_before_...`."""
    metrics = {}
    for result in results:
        prefix = "test_before_" if result.model == "before" else "test_"
        metrics[f"{prefix}clean_accuracy"] = result.clean_accuracy
        metrics[prefix + result.robust_name] = result.robust_accuracy
    return metrics


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    return {"python": platform.python_version(), "hf-robust-vision": __version__} | packages


def source_hash() -> str:
    """First 16 hex digits of the SHA-256 of the package's source."""
    root = Path(__file__).parents[1]
    text = b"".join(file.read_bytes() for file in sorted(root.rglob("*.py")))
    return hashlib.sha256(text).hexdigest()[:16]
