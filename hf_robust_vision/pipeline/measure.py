"""One model on one or many datasets, written down: what `hf-robust-vision evaluate` and its recipe call."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from hf_robust_vision.data.datasets import LabelledImages, load_labelled_images
from hf_robust_vision.data.demo import demo_checkpoint, load_demo
from hf_robust_vision.data.splits import seeded_subset
from hf_robust_vision.data.templates import get_templates, read_class_names
from hf_robust_vision.evaluation.results import RobustnessResult, add_results
from hf_robust_vision.evaluation.task import RobustnessProtocol
from hf_robust_vision.evaluation.tasks.corruptions import evaluate_corruptions
from hf_robust_vision.evaluation.tasks.zero_shot import ZeroShot, evaluate_zero_shot
from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.processes import barrier, meet, rank_and_world
from hf_robust_vision.sanity.check import add_sanity
from hf_robust_vision.towers.clip import CLIPEncoder, load_encoder, load_tokenizer
from hf_robust_vision.towers.text_bank import TextBank, make_text_bank


DEMO_MODEL = "demo-clip"


@dataclass(frozen=True)
class EvaluationSet:
    """A labelled dataset to measure on, as the command line or an entry of a YAML list says it.

    Args:
        dataset: Folder or Hub name; None is the demo.
        name: What results call it; by default the dataset's own name.
        config: Configuration of a Hub dataset.
        revision: Branch, tag or commit on the Hub.
        split: Of the dataset.
        image_column: Column of the image; by default found.
        label_column: Column of the label.
        class_names: File of names in the order of the labels: a local file, or one of the dataset's own folder or Hub
            repository. By default the names that the label column carries.
        templates: Name of a template set, or a file found like `class_names`; by default "photo", the demo's "demo".
        resolution: Attack square images of this size and resize them inside the attacked function; by default the
            images are fitted to the tower first and attacked at its size.
        max_samples: Seeded subset; all by default.
        skip_corrupt: Count and leave out images that can not be decoded.
    """

    dataset: str | None = None
    name: str | None = None
    config: str | None = None
    revision: str | None = None
    split: str = "test"
    image_column: str | None = None
    label_column: str = "label"
    class_names: str | None = None
    templates: str | None = None
    resolution: int | None = None
    max_samples: int | None = None
    skip_corrupt: bool = False

    def load(self, transform: PixelTransform) -> tuple[LabelledImages, tuple[str, ...]]:
        """The images, fitted to a tower (or to `resolution`), and the prompt templates.

        Raises:
            ValueError: If the dataset, a file or a column is not there.
        """
        if self.resolution is not None:
            transform = replace(transform, resize=(self.resolution,) * 2, crop=(self.resolution,) * 2)
        if self.dataset is None:
            images, templates = load_demo(self.split, transform), get_templates(self.templates or "demo")
        else:
            names = read_class_names(self._file(self.class_names)) if self.class_names is not None else None
            # A template set by name first, as everywhere; then a file.
            templates = get_templates(str(self._file(self.templates)) if self.templates else "photo")
            images = cast(
                LabelledImages,
                load_labelled_images(
                    self.dataset,
                    self.split,
                    transform,
                    config_name=self.config,
                    image_column=self.image_column,
                    label_column=self.label_column,
                    class_names=names,
                    revision=self.revision,
                ),
            )
        if self.name is not None:
            images.name = self.name
        images = seeded_subset(images, self.max_samples, seed=0)
        return self._readable(images), templates

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

    def _readable(self, images: LabelledImages) -> LabelledImages:
        if not self.skip_corrupt:
            return images
        broken = set(images.corrupt())
        if broken and rank_and_world()[0] == 0:
            warnings.warn(f"skipped {len(broken)} corrupt images of {images.name} ({images.split})", stacklevel=2)
        return images.select([index for index in range(len(images)) if index not in broken])


def measure_model(
    model: str,
    sets: Sequence[EvaluationSet],
    how: RobustnessProtocol,
    output_dir: str | Path,
    *,
    name: str | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    examples: int = 0,
    save_adversarial: bool = False,
    sanity: bool = False,
    surrogate: str | None = None,
    corruptions: bool = False,
) -> list[RobustnessResult]:
    """Measure a model on datasets and add the results to `output_dir/robustness.json`, one dataset at a time.

    Under a launcher the samples are shared out over the processes, and the first one writes; all get the results.
    All datasets are opened before the first is measured. Killed and called again, it goes on from the samples that are
    written down. Results of other models or datasets that the folder holds stay there.

    Args:
        model: Folder or Hub id of a `CLIPModel`, or "demo-clip".
        sets: What to measure on.
        how: Attacks and radii.
        output_dir: For `robustness.json` and the samples files.
        name: What results call the model; by default its id, or the name of its folder.
        revision: Branch, tag or commit of the model.
        device: Where to run; by default a GPU where there is one.
        dtype: Precision of the model under attack.
        examples: Samples of each dataset whose images are kept for the report, spread evenly over it.
        save_adversarial: Keep the images of all samples.
        sanity: Check the numbers for gradient masking (`check_sanity`).
        surrogate: Folder or Hub id of the model whose adversarial images that check carries over, or "demo-clip".
        corruptions: Measure accuracy on corrupted images, too (`evaluate_corruptions`).

    Returns:
        The results of this call.

    Raises:
        ValueError: If a model or a dataset can not be read or used, or there is a surrogate and nothing to check.
    """
    if surrogate is not None and not sanity:
        raise ValueError(f"the surrogate {surrogate} serves the sanity checks only; ask for them, too (--sanity).")
    device = meet(device)
    encoder, folder = load_model(model, revision=revision, device=device, dtype=dtype)
    tokenizer = load_tokenizer(folder, revision=revision)
    other = load_model(surrogate, device=device, dtype=dtype) if surrogate is not None else None
    opened = [part.load(encoder.transform) for part in sets]
    label, results = name or (Path(model).resolve().name if Path(model).is_dir() else model), []
    for images, templates in opened:
        count = len(images) if save_adversarial else min(examples, len(images))
        bank = make_text_bank(encoder, tokenizer, images.class_names, templates)
        attacked = evaluate_zero_shot(
            encoder,
            bank,
            images,
            how,
            model_name=label,
            samples_dir=output_dir,
            save_images={images.ids[place * len(images) // count] for place in range(count)},
        )
        corrupted = []
        if corruptions:
            corrupted = evaluate_corruptions(
                encoder,
                bank,
                images,
                model_name=label,
                seed=how.seed,
                batch_size=how.batch_size,
                samples_dir=output_dir,
            )
        if rank_and_world()[0] == 0:
            add_results(attacked + corrupted, output_dir)  # before the checks, which may take hours
            if sanity:
                tasks = {label: ZeroShot(encoder, bank, images)}
                if other is not None:
                    second = make_text_bank(other[0], load_tokenizer(other[1]), images.class_names, templates)
                    tasks[f"{surrogate} (surrogate)"] = ZeroShot(other[0], second, images)
                add_sanity(attacked, tasks, how)
                add_results(attacked, output_dir)
        barrier()
        results += attacked + corrupted
    return results


def load_model(
    model: str, *, revision: str | None = None, device: str | None = None, dtype: torch.dtype = torch.float32
) -> tuple[CLIPEncoder, str]:
    """An encoder on its device, and the folder or Hub id that it came from; "demo-clip" is the shipped one.

    Raises:
        ValueError: If it can not be read, or has no text tower to measure with.
    """
    folder = str(demo_checkpoint()) if model == DEMO_MODEL and not Path(model).is_dir() else model
    try:
        encoder = load_encoder(folder, revision=revision, dtype=dtype)
    except OSError as error:
        raise ValueError(
            f"{model} is neither a model folder nor a model of the Hub that can be read: {error}"
        ) from error
    if not isinstance(encoder, CLIPEncoder):
        raise ValueError(f"{model} has no text tower to classify with; name the whole CLIPModel.")
    return encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), folder


def bank_of(result: RobustnessResult, encoder: CLIPEncoder, folder: str, revision: str | None = None) -> TextBank:
    """The classifier of a result, made again by its model from the result's class names and templates."""
    tokenizer = load_tokenizer(folder, revision=revision)
    return make_text_bank(encoder, tokenizer, result.class_names, result.templates)
