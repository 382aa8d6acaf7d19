"""A recorded measurement made again on its own samples, to see whether a model gives the numbers it came with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from hf_robust_vision.attacks import Protocol, get_protocol
from hf_robust_vision.data.datasets import LabelledImages, load_labelled_images
from hf_robust_vision.data.demo import DEMO_NAME, load_demo
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.clip import CLIPEncoder
from hf_robust_vision.towers.text_bank import make_text_bank

from .results import RobustnessResult, SampleRecord
from .task import RobustnessProtocol
from .tasks.zero_shot import evaluate_zero_shot


@dataclass(frozen=True)
class Repeat:
    """What a repeated measurement gave.

    Args:
        samples: How many were measured again.
        flags: Clean and robust outcomes compared: one clean and, per radius, one robust a sample.
        differing: Ids whose clean or robust outcome is another than the recorded one.
    """

    samples: int
    flags: int
    differing: tuple[int | str, ...]

    def __str__(self) -> str:
        told = f"{self.samples} samples measured again, {self.flags} outcomes"
        return f"{told}: {len(self.differing)} samples differ" if self.differing else f"{told}: all as recorded"


def repeat_zero_shot(
    encoder: CLIPEncoder,
    tokenizer: Any,
    results: Sequence[RobustnessResult],
    folder: str | Path,
    *,
    dataset: LabelledImages | str | Path | None = None,
    max_samples: int | None = None,
    batch_size: int = 64,
) -> Repeat:
    """Measure a model again on samples of its recorded zero-shot results, radius by radius, and compare every flag.

    The attacks, their random starts and the prompts are the recorded ones. On the same kind of machine the flags are
    equal; on another, rounding may tip a sample at the very border.

    Args:
        encoder: The model that the results are of.
        tokenizer: Its tokenizer.
        results: Of this model; those of other tasks are left out.
        folder: Where their `samples-*.jsonl` lie.
        dataset: What was measured on: by default the demo's or a dataset of the recorded name; a local folder by its
            path; anything else as `LabelledImages`.
        max_samples: Measure so many, evenly spread over the recorded ones; by default all.
        batch_size: Images attacked at once.

    Raises:
        ValueError: If there is nothing to repeat, the data is not what was measured on, or the protocol of that name is
            another in this version.
    """
    wanted = [result for result in results if result.task == "zero_shot" and result.samples is not None]
    if not wanted:
        raise ValueError("there is no zero-shot result with a samples file to measure again.")
    runs = [_repeat(encoder, tokenizer, run, Path(folder), dataset, max_samples, batch_size) for run in _runs(wanted)]
    differing = tuple(dict.fromkeys(sample for run in runs for sample in run.differing))
    return Repeat(sum(run.samples for run in runs), sum(run.flags for run in runs), differing)


def _runs(results: Sequence[RobustnessResult]) -> Iterator[list[RobustnessResult]]:
    """The radii that were measured together: a sample that fell at one was not attacked again at the next."""

    def run_of(result: RobustnessResult) -> tuple[str, ...]:
        return result.dataset, result.split, result.group, result.protocol, result.norm, result.model

    for _, run in groupby(sorted(results, key=run_of), key=run_of):
        yield sorted(run, key=lambda result: result.eps)


def _settings(result: RobustnessResult) -> list[dict[str, Any]]:
    """The attacks without what they found."""
    return [{name: value for name, value in row.items() if name != "robust_accuracy"} for row in result.attacks]


def _repeat(
    encoder: CLIPEncoder,
    tokenizer: Any,
    run: list[RobustnessResult],
    folder: Path,
    dataset: LabelledImages | str | Path | None,
    max_samples: int | None,
    batch_size: int,
) -> Repeat:
    recorded = [_read(folder / str(result.samples)) for result in run]
    count = len(recorded[0])
    kept = count if max_samples is None else min(max_samples, count)
    ids = [list(recorded[0])[place * count // kept] for place in range(kept)]
    images = _images(run[0], dataset, encoder.transform)
    where = {sample: place for place, sample in enumerate(images.ids)}
    labels = images.labels()
    strange = [i for i in ids if int(i) not in where or labels[where[int(i)]] != recorded[0][i].label]
    if strange or list(images.class_names) != run[0].class_names:
        raise ValueError(
            f"{images.name} ({images.split}) is not the data that was measured on: "
            + (f"samples {strange[:5]} are missing or have other labels." if strange else "it has other class names.")
        )
    images = images.select([where[int(sample)] for sample in ids])
    bank = make_text_bank(encoder, tokenizer, run[0].class_names, run[0].templates)
    how = _protocol(run, batch_size)
    with TemporaryDirectory() as place:
        again = evaluate_zero_shot(encoder, bank, images, how, model_name="again", samples_dir=place, progress=False)
        repeated = [_read(Path(place) / str(result.samples)) for result in again]
    for old, new in zip(run, again, strict=True):
        if _settings(old) != _settings(new):
            raise ValueError(
                f"the protocol {old.protocol!r} was recorded as {old.attacks}; this version and model run {new.attacks}."
            )
    differing = tuple(
        sample
        for sample in ids
        if any(_flags(old[sample]) != _flags(new[sample]) for old, new in zip(recorded, repeated, strict=True))
    )
    return Repeat(len(ids), len(ids) * (1 + len(run)), differing)


def _flags(record: SampleRecord) -> tuple[int | str, bool]:
    return record.clean, record.robust_hit


def _read(path: Path) -> dict[int | str, SampleRecord]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: the samples of a result lie beside it.")
    records = [SampleRecord(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return {record.id: record for record in records}


def _images(
    result: RobustnessResult, dataset: LabelledImages | str | Path | None, transform: PixelTransform
) -> LabelledImages:
    if isinstance(dataset, LabelledImages):
        return dataset
    if dataset is None and result.dataset == DEMO_NAME:
        return load_demo(result.split, transform)
    return cast(LabelledImages, load_labelled_images(dataset or result.dataset, result.split, transform))


def _protocol(run: list[RobustnessResult], batch_size: int) -> RobustnessProtocol:
    """The recorded steps and restarts on the protocol of that name; whether it fits is checked after the measurement."""
    named = get_protocol(run[0].protocol)
    steps = {row["name"]: row["steps"] for row in run[0].attacks}
    own = {attack.name: attack.restarts for attack in named.attacks}
    restarts = [
        (result.eps, int(result.attacks[0]["restarts"]))
        for result in run
        if any(row["restarts"] != own.get(row["name"]) for row in result.attacks)
    ]
    return RobustnessProtocol(
        Protocol(named.name, tuple(replace(a, steps=steps.get(a.name, a.steps)) for a in named.attacks)),
        tuple(result.eps for result in run),
        run[0].norm,
        tuple(restarts),
        batch_size,
        int(run[0].attacks[0]["seed"]),
    )
