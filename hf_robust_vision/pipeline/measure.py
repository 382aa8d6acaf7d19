"""One model on one or many datasets, written down: what `hf-robust-vision evaluate` and its recipe call."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from transformers import AutoConfig
from typing_extensions import Unpack

from hf_robust_vision.attacks import get_protocol
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.demo import load_demo, refuse_ignored, shipped
from hf_robust_vision.data.sources import ImageSource, load_labelled_images
from hf_robust_vision.data.splits import seeded_subset, without_corrupt
from hf_robust_vision.data.templates import get_templates, read_class_names
from hf_robust_vision.evaluation.engine import evaluate
from hf_robust_vision.evaluation.results import RobustnessResult, add_results, check_results_file
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.corruptions import evaluate_corruptions
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.processes import barrier, meet, part, rank_and_world
from hf_robust_vision.report.page import write_report
from hf_robust_vision.report.tables import lying, results_text
from hf_robust_vision.sanity.check import add_sanity, sanity_text
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import Encoder, load_encoder
from hf_robust_vision.towers.processors import load_tokenizer
from hf_robust_vision.towers.text_bank import make_text_bank
from hf_robust_vision.towers.weights import local_or_hub, reading
from hf_robust_vision.training.config import Radius

from .estimate import say_cost


DEMO_MODEL = "demo-clip"
MAX_RESOLUTION = 4096  # a batch of larger images fits nowhere


@dataclass(frozen=True)
class EvaluationSet:
    """A labelled dataset to measure on, as the command line or an entry of a YAML list says it."""

    dataset: str | None = None  # folder or Hub name; None is the demo
    name: str | None = None  # what results call it; by default the dataset's own name
    config: str | None = None  # configuration of a Hub dataset
    revision: str | None = None  # branch, tag or commit on the Hub
    split: str = "test"
    image_column: str | None = None  # by default found
    label_column: str = "label"
    # Of names in the order of the labels: a local file, or one of the dataset's own folder or Hub repository; or
    # "openai-imagenet". By default the names that the label column carries.
    class_names: str | None = None
    templates: str | None = None  # a set, or a file found like `class_names`; by default "photo", the demo's "demo"
    # Attack square images of this size and resize them inside the attacked function; by default the images are fitted
    # to the tower first and attacked at its size.
    resolution: int | None = None
    max_samples: int | None = None  # seeded subset; all by default
    skip_corrupt: bool = False  # count and leave out images that can not be decoded

    def __post_init__(self) -> None:
        for name, most in (("max_samples", None), ("resolution", MAX_RESOLUTION)):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and 1 <= value <= (most or value)):
                limit = f" and at most {most}" if most else ""
                raise ValueError(f"{name} must be a whole number of at least 1{limit}, got {value!r}.")

    def load(self, transform: PixelTransform) -> tuple[LabelledImages, tuple[str, ...]]:
        """The images, fitted to a tower (or to `resolution`), and the prompt templates."""
        if self.resolution is not None:
            transform = replace(transform, resize=(self.resolution,) * 2, crop=(self.resolution,) * 2)
        if self.dataset is None:
            refuse_ignored(self, "config", "revision", "image_column", "label_column", "class_names")
            images, templates = load_demo(self.split, transform), get_templates(self.templates or "demo")
        else:
            names = read_class_names(self._file(self.class_names)) if self.class_names else None
            # A template set by name first, as everywhere; then a file.
            templates = get_templates(str(self._file(self.templates)) if self.templates else "photo")
            source = ImageSource(self.dataset, self.config, self.revision, self.image_column, self.label_column, names)
            images = load_labelled_images(source, self.split, transform)
        if self.name is not None:
            images.name = self.name
        images = seeded_subset(images, self.max_samples, seed=0)
        return without_corrupt(images, skip=True) if self.skip_corrupt else images, templates

    def _file(self, name: str) -> Path | str:
        """A local file, one that belongs to the dataset, or the name as it is."""
        assert self.dataset is not None
        if Path(name).is_file() or "." not in name:
            return name
        if Path(self.dataset).is_dir():
            return Path(self.dataset) / name
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            return Path(hf_hub_download(self.dataset, name, repo_type="dataset", revision=self.revision))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise ValueError(f"{name} is neither a file nor one of {self.dataset} on the Hub: {error}") from error


def protocol_of(values: Mapping[str, Any]) -> RobustnessProtocol:
    """The attacks and radii of a command line or a YAML list, both of which name them alike."""
    return RobustnessProtocol(
        get_protocol(values["protocol"], **{name: values.get(name) for name in ("steps", "restarts", "queries")}),
        tuple(float(Radius(eps)) for eps in values["eps"]),
        values.get("norm", "linf"),
        batch_size=values.get("batch_size", 64),
        seed=values.get("seed", 0),
    )


class Measuring(TypedDict, total=False):
    """What else a measurement is told."""

    name: str | None  # what results call the model; by default its id, or the name of its folder
    revision: str | None  # branch, tag or commit of the model
    device: str | None  # by default a GPU where there is one
    dtype: torch.dtype  # of the model under attack; by default float32
    examples: int  # samples of each dataset whose images are kept for the report, evenly spread; by default none
    save_adversarial: bool  # keep the images of all samples
    sanity: bool  # check the numbers for gradient masking (`check_sanity`)
    samples: int | None  # that those checks look at
    surrogate: str | None  # folder or Hub id of the model whose adversarial images they carry over, or "demo-clip"
    corruptions: bool  # measure accuracy on corrupted images, too (`evaluate_corruptions`)
    progress: bool  # show bars; by default yes


def measure_model(
    model: str,
    sets: Sequence[EvaluationSet],
    how: RobustnessProtocol,
    output_dir: str | Path,
    **settings: Unpack[Measuring],
) -> list[RobustnessResult]:
    """Measure a model on datasets and add the results to `output_dir/robustness.json`, one dataset at a time.

    Under a launcher the samples are shared out over the processes, and the first one writes; all get the results.
    All datasets are opened before the first is measured. Killed and called again, it goes on from the samples that are
    written down. Results of other models or datasets that the folder holds stay there.

    The model is a folder or Hub id of a `CLIPModel`, or "demo-clip"; the settings are those of `Measuring`.

    Raises:
        ValueError: If a model, a dataset or the results in `output_dir` can not be read or used, or something is asked
            for checks that are not made.
    """
    surrogate, dtype = settings.get("surrogate"), settings.get("dtype", torch.float32)
    for flag in ("surrogate", "samples"):
        if settings.get(flag) is not None and not settings.get("sanity"):
            raise ValueError(f"--{flag} {settings[flag]} serves the sanity checks only; ask for them, too (--sanity).")
    device = meet(settings.get("device"))
    check_output(output_dir)
    encoder, tokenizer = load_model(model, revision=settings.get("revision"), device=device, dtype=dtype)
    other = load_model(surrogate, device=device, dtype=dtype) if surrogate is not None else None
    opened = [one.load(encoder.transform) for one in sets]
    label = settings.get("name") or (Path(model).resolve().name if Path(model).is_dir() else model)
    results = []
    for images, templates in opened:
        task = ZeroShot(encoder, make_text_bank(encoder, tokenizer, images.class_names, templates), images)
        say_cost(task, how, "--max_samples N, or a protocol with fewer steps")
        whole = settings.get("save_adversarial", False)
        count = len(images) if whole else min(settings.get("examples", 0), len(images))
        kept = {images.ids[place * len(images) // count] for place in range(count)}
        shared: dict[str, Any] = {"model_name": label, "samples_dir": output_dir}
        shared["progress"] = settings.get("progress", True)
        attacked = evaluate(task, how, save_images=kept, **shared)
        corrupted = []
        if settings.get("corruptions"):
            shared |= {"seed": how.seed, "batch_size": how.batch_size}
            corrupted = evaluate_corruptions(encoder, task.bank, images, **shared)
        if rank_and_world()[0] == 0:
            add_results(attacked + corrupted, output_dir)  # before the checks, which may take hours
            if settings.get("sanity"):
                tasks = {label: task}
                if other is not None:
                    second = make_text_bank(*other, images.class_names, templates)
                    tasks[f"{surrogate} (surrogate)"] = ZeroShot(other[0], second, images)
                samples = settings.get("samples")
                add_sanity(attacked, tasks, how, **({} if samples is None else {"samples": samples}))
                add_results(attacked, output_dir)
        barrier()
        results += attacked + corrupted
    return results


def measured_text(results: Sequence[RobustnessResult]) -> str:
    """Results, and the verdicts of their sanity checks where some were made, for a terminal."""
    checked = any(result.sanity for result in results)
    return "\n".join([results_text(results), *([sanity_text(results)] if checked else [])])


def report_and_part(results: Sequence[RobustnessResult], output_dir: str | Path, examples: int) -> None:
    """Print what `measure_model` found and write the report, in the first process; then part."""
    # The others already wait in `part`: nothing in this branch may talk to them.
    if rank_and_world()[0] == 0:
        print(measured_text(results))
        pages = [str(page) for page in write_report([output_dir], output_dir, examples=examples)]
        print("", lying(output_dir, pages), sep="\n")
    part()


def check_output(folder: str | Path) -> None:
    """Refuse a folder that can not be written into or holds damaged results: good to know before hours of measuring."""
    place = next(place for place in (Path(folder), *Path(folder).absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        reason = "may not be written into" if place.is_dir() else "is no folder"
        raise ValueError(f"--output_dir {folder} can not be used: {place} {reason}.")
    check_results_file(folder)


def load_model(
    model: str, *, revision: str | None = None, device: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[DualEncoder, Any]:
    """An encoder on its device, and its tokenizer, from a folder or the Hub; "demo-clip" is the shipped one."""
    encoder, folder = read_model(model, revision=revision, dtype=dtype)
    if not isinstance(encoder, DualEncoder):
        raise ValueError(f"{model} has no text tower to classify with; name the whole CLIPModel.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return encoder.to(device), load_tokenizer(folder, revision=revision)


def check_model(model: str) -> None:
    """Refuse a name that is no model's, by a look at its config alone."""
    with reading(model):
        AutoConfig.from_pretrained(local_or_hub(shipped(model)))


def read_model(model: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> tuple[Encoder, str]:
    """An encoder with or without a text tower, and the folder or Hub id that the rest of it is read from."""
    folder = shipped(model)
    with reading(model):
        return load_encoder(folder, revision=revision, dtype=dtype), folder
