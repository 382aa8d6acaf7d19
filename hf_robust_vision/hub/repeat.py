"""A recorded measurement made again on its own samples, to see whether a model gives the numbers it came with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypedDict

from typing_extensions import Unpack

from hf_robust_vision.attacks import Protocol
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.demo import DEMO_NAME, load_demo
from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.evaluation.consistency import check_results, measurements
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord
from hf_robust_vision.evaluation.task import RobustnessProtocol, SampleId, Task
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.text_bank import make_text_bank


@dataclass(frozen=True)
class Repeat:
    """How many samples were measured again, how many outcomes compared, and the ids of those with another outcome."""

    samples: int
    flags: int
    differing: tuple[int | str, ...]

    def __str__(self) -> str:
        told = f"{self.samples} samples measured again, {self.flags} outcomes"
        return f"{told}: {len(self.differing)} samples differ" if self.differing else f"{told}: all as recorded"


class RepeatSettings(TypedDict, total=False):
    """What is measured again."""

    # By default the demo's or a dataset of the recorded name; a local folder by its path; or anything else, loaded.
    dataset: LabelledImages | str | Path | None
    max_samples: int | None  # evenly spread over the recorded ones; by default all
    batch_size: int  # 64 unless told otherwise


def repeat_zero_shot(
    encoder: DualEncoder,
    tokenizer: Any,
    results: Sequence[RobustnessResult],
    folder: str | Path,
    **settings: Unpack[RepeatSettings],
) -> Repeat:
    """Measure a model again on samples of its recorded zero-shot results, radius by radius, and compare every flag.

    The attacks, their random starts and the prompts are the recorded ones. On the same kind of machine the flags are
    equal; on another, rounding may tip a sample at the very border. Results of other tasks are left out; their
    `samples-*.jsonl` lie in `folder`.

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
    differing, samples, flags = dict[SampleId, None](), 0, 0
    most = settings.get("max_samples")
    for run in measurements(wanted):
        recorded = [{record.id: record for record in found[str(result.samples)]} for result in run]
        ids = list(recorded[0])
        count = len(ids) if most is None else min(most, len(ids))
        kept = {sample: recorded[0][sample] for sample in (ids[place * len(ids) // count] for place in range(count))}
        images = _select(_images(run[0], settings.get("dataset"), encoder.transform), run[0], kept)
        bank = make_text_bank(encoder, tokenizer, run[0].class_names, run[0].templates)
        how = _protocol(run, settings.get("batch_size", 64))
        for old, new in zip(recorded, _measure(ZeroShot(encoder, bank, images), how, run)):
            was = {i: (row.clean, row.robust_hit) for i, row in old.items()}
            differing |= {i: None for i, row in new.items() if (row.clean, row.robust_hit) != was[i]}
        samples, flags = samples + count, flags + count * (1 + len(run))
    return Repeat(samples, flags, tuple(differing))


def _images(
    result: RobustnessResult, dataset: LabelledImages | str | Path | None, transform: PixelTransform
) -> LabelledImages:
    if isinstance(dataset, LabelledImages):
        return dataset
    if dataset is None and result.dataset == DEMO_NAME:
        return load_demo(result.split, transform)
    return load_labelled_images(dataset or result.dataset_id or result.dataset, result.split, transform)


def _select(
    images: LabelledImages, result: RobustnessResult, records: Mapping[SampleId, SampleRecord]
) -> LabelledImages:
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


def _measure(
    task: Task, how: RobustnessProtocol, run: Sequence[RobustnessResult]
) -> list[dict[SampleId, SampleRecord]]:
    """The records of each radius, by id."""
    # Through files, as the records came: what a file can not hold would count as a difference.
    with TemporaryDirectory() as place:
        again = evaluate(task, how, model_name="again", samples_dir=place, progress=False)
        samples = check_results(again, place)
    for old, new in zip(run, again, strict=True):
        # The attacks without what they found.
        was, now = ([dict(row, robust_accuracy=None) for row in result.attacks] for result in (old, new))
        if was != now:
            raise ValueError(
                f"the protocol {old.protocol!r} was recorded as {old.attacks}; this version and model run {new.attacks}."
            )
    return [{record.id: record for record in samples[str(result.samples)]} for result in again]


def _protocol(run: Sequence[RobustnessResult], batch_size: int) -> RobustnessProtocol:
    """The recorded attacks; a radius with restarts of its own has as many of every attack."""
    restarts = {result.eps: [int(row["restarts"]) for row in result.attacks] for result in run}
    # Radii whose attacks all have one count may be a `restarts` of the protocol; mixed counts are its own.
    base = max(run, key=lambda result: len(set(restarts[result.eps])))
    own = [(eps, counts[0]) for eps, counts in restarts.items() if counts != restarts[base.eps]]
    protocol = Protocol.from_rows(base.protocol, base.attacks, base.carry)
    return RobustnessProtocol(
        protocol, tuple(restarts), base.norm, tuple(own), batch_size, int(base.attacks[0]["seed"])
    )
