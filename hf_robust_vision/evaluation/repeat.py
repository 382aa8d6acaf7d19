"""A recorded measurement made again on its own samples, to see whether a model gives the numbers it came with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hf_robust_vision.attacks import Protocol
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.demo import DEMO_NAME, load_demo
from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.clip import CLIPEncoder
from hf_robust_vision.towers.text_bank import make_text_bank

from .consistency import check_results, measurements
from .results import RobustnessResult, SampleRecord
from .task import RobustnessProtocol
from .tasks.zero_shot import evaluate_zero_shot


Records = Mapping[int | str, SampleRecord]


@dataclass(frozen=True)
class Repeat:
    """How many samples were measured again, how many outcomes compared, and the ids of those with another outcome."""

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
        ValueError: If there is nothing to repeat, the records do not fit the results, the data is not what was measured
            on, or this version can not run the recorded attacks.
    """
    wanted = [result for result in results if result.task == "zero_shot" and result.samples is not None]
    if not wanted:
        raise ValueError("there is no zero-shot result with a samples file to measure again.")
    found = check_results(wanted, folder)
    if missing := [result.samples for result in wanted if result.samples not in found]:
        raise ValueError(f"{Path(folder) / str(missing[0])} is missing: the samples of a result lie beside it.")
    repeats = []
    for run in measurements(wanted):
        recorded = [{record.id: record for record in found[str(result.samples)]} for result in run]
        kept = _evenly(list(recorded[0]), max_samples)
        images = _select(_images(run[0], dataset, encoder.transform), run[0], {i: recorded[0][i] for i in kept})
        repeats.append(_repeat(encoder, tokenizer, run, recorded, images, batch_size))
    differing = tuple(dict.fromkeys(sample for repeat in repeats for sample in repeat.differing))
    return Repeat(sum(repeat.samples for repeat in repeats), sum(repeat.flags for repeat in repeats), differing)


def _evenly(ids: list[int | str], most: int | None) -> list[int | str]:
    kept = len(ids) if most is None else min(most, len(ids))
    return [ids[place * len(ids) // kept] for place in range(kept)]


def _images(
    result: RobustnessResult, dataset: LabelledImages | str | Path | None, transform: PixelTransform
) -> LabelledImages:
    if isinstance(dataset, LabelledImages):
        return dataset
    if dataset is None and result.dataset == DEMO_NAME:
        return load_demo(result.split, transform)
    return load_labelled_images(dataset or result.dataset, result.split, transform)


def _select(images: LabelledImages, result: RobustnessResult, records: Records) -> LabelledImages:
    """The images of some records, in their order."""
    where = {sample: place for place, sample in enumerate(images.ids)}
    labels = images.labels()
    strange = [i for i, row in records.items() if int(i) not in where or labels[where[int(i)]] != row.label]
    if strange or list(images.class_names) != result.class_names:
        raise ValueError(
            f"{images.name} ({images.split}) is not the data that was measured on: "
            + (f"samples {strange[:5]} are missing or have other labels." if strange else "it has other class names.")
        )
    return images.select([where[int(sample)] for sample in records])


def _repeat(
    encoder: CLIPEncoder,
    tokenizer: Any,
    run: Sequence[RobustnessResult],
    recorded: Sequence[Records],
    images: LabelledImages,
    batch_size: int,
) -> Repeat:
    bank = make_text_bank(encoder, tokenizer, run[0].class_names, run[0].templates)
    how = _protocol(run, batch_size)
    with TemporaryDirectory() as place:
        again = evaluate_zero_shot(encoder, bank, images, how, model_name="again", samples_dir=place, progress=False)
        samples = check_results(again, place)
    for old, new in zip(run, again, strict=True):
        if _settings(old) != _settings(new):
            raise ValueError(
                f"the protocol {old.protocol!r} was recorded as {old.attacks}; this version and model run {new.attacks}."
            )
    repeated = [{record.id: record for record in samples[str(result.samples)]} for result in again]
    differing = tuple(
        sample
        for sample in repeated[0]
        if any(_flags(old[sample]) != _flags(new[sample]) for old, new in zip(recorded, repeated))
    )
    return Repeat(len(images), len(images) * (1 + len(run)), differing)


def _settings(result: RobustnessResult) -> list[dict[str, Any]]:
    """The attacks without what they found."""
    return [{name: value for name, value in row.items() if name != "robust_accuracy"} for row in result.attacks]


def _flags(record: SampleRecord) -> tuple[int | str, bool]:
    return record.clean, record.robust_hit


def _protocol(run: Sequence[RobustnessResult], batch_size: int) -> RobustnessProtocol:
    """The recorded attacks; a radius with restarts of its own has as many of every attack."""
    restarts = {result.eps: [int(row["restarts"]) for row in result.attacks] for result in run}
    base = max(run, key=lambda result: len(set(restarts[result.eps])))
    own = [(eps, counts[0]) for eps, counts in restarts.items() if counts != restarts[base.eps]]
    protocol = Protocol.from_rows(base.protocol, base.attacks, base.carry)
    return RobustnessProtocol(
        protocol, tuple(restarts), base.norm, tuple(own), batch_size, int(base.attacks[0]["seed"])
    )
