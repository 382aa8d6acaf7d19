"""Zero-shot classification of corrupted images: the families of ImageNet-C at their five severities.

No attacker is at work here. The corruptions are those of the package `imagecorruptions-imaug`, a kept copy of the
benchmark's own code; none of them is written anew.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_robust_vision import __version__
from hf_robust_vision.attacks import Margin
from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.evaluation.results import RobustnessResult, SampleRecord, versions, wilson_interval
from hf_robust_vision.evaluation.samples import Records, SampleId, SampleStore, measure_all
from hf_robust_vision.pixels import check_images
from hf_robust_vision.towers.clip import Encoder, attack_mode, tensor_sha256, weights_sha256
from hf_robust_vision.towers.text_bank import TextBank

from .zero_shot import classifier


PROTOCOL = "imagenet-c"
FAMILIES = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA_FAMILIES = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # the benchmark keeps them for validation
SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST = 32  # edge in pixels below which the library refuses an image
_LIBRARY = "imagecorruptions-imaug"


def corrupt(image: Tensor, family: str, severity: int, *, seed: int = 0, sample: int | str = 0) -> Tensor:
    """One corrupted image, always the same one for the same seed and sample id.

    Args:
        image: In [0, 1], shape (3, height, width), at least 32 pixels a side. The library takes it rounded to 8 bits.
        family: One of `FAMILIES` or `EXTRA_FAMILIES`.
        severity: 1 to 5.
        seed: Of the run.
        sample: Id of the image.

    Returns:
        In [0, 1], of the same shape, dtype and device.

    Raises:
        ModuleNotFoundError: If the library is not installed; the message is the line to type.
        ValueError: If the family or the severity is unknown, or the image is too small.

    Reference:
        Hendrycks and Dietterich 2019, https://huggingface.co/papers/1903.12261.
    """
    library = _library()
    _check_choice(library, [family], [severity])
    if min(image.shape[-2:]) < SMALLEST:
        raise ValueError(
            f"corruptions need images of at least {SMALLEST} pixels a side, got {tuple(image.shape[-2:])}."
        )
    digest = hashlib.blake2b(f"{seed}/{sample}/{family}/{severity}".encode(), digest_size=4).digest()
    draw = int.from_bytes(digest, "little")
    pixels = (image.detach() * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    # Two families draw from a generator of their own, the others from numpy's global one.
    own = {"seed": draw} if "seed" in inspect.signature(library.corruption_dict[family]).parameters else {}
    with _numpy_seeded(draw):
        found = library.corrupt(np.ascontiguousarray(pixels), severity=severity, corruption_name=family, **own)
    return (torch.from_numpy(np.array(found)).permute(2, 0, 1).float() / 255).to(image)


def evaluate_corruptions(
    encoder: Encoder,
    bank: TextBank,
    dataset: LabelledImages,
    *,
    model_name: str,
    families: Sequence[str] | None = None,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    samples_dir: str | Path | None = None,
    progress: bool = True,
) -> list[RobustnessResult]:
    """Accuracy on corrupted images, one result per severity.

    In a result `robust_accuracy` is the mean over the families, `attacks` has a row with the accuracy of each, and
    `left_out` names the families of ImageNet-C that were not measured; `eps` is the severity and `norm` the word
    "severity". It is accuracy, not the benchmark's mCE, which is relative to AlexNet's errors on ImageNet. Samples are
    shared out over processes, and resumed from `samples_dir`, as in `evaluate_zero_shot`; the id of a record is
    "family/sample".

    Deviation: ImageNet-C corrupts crops of 224 pixels and stores them as JPEG. Here an image is corrupted at the size
    that the dataset gives it, which the rows call `resolution`, and not compressed. The strengths were chosen for 224
    pixels: the same blur takes more from a smaller image.

    Args:
        encoder: The model.
        bank: The zero-shot classifier.
        dataset: Labelled images of at least 32 pixels a side.
        model_name: "before", "after", or a path, for the results.
        families: Out of `FAMILIES` and `EXTRA_FAMILIES`; by default those of `FAMILIES` that the library has.
        severities: Out of 1 to 5.
        seed: Of the corruptions.
        batch_size: Images classified at once.
        device: Where to run; by default where the encoder is.
        samples_dir: Folder for `samples-*.jsonl`.
        progress: Show a bar on the main process.

    Raises:
        ModuleNotFoundError: If the library is not installed; the message is the line to type.
        ValueError: If a family or severity is unknown, or the class names of dataset and bank differ.
    """
    library = _library()
    bank.need_classes(dataset.class_names)
    if families is None:
        families = [name for name in FAMILIES if name in library.corruption_dict]
    _check_choice(library, families, severities)
    start, sha256 = time.time(), weights_sha256(encoder)
    device = torch.device(device) if device is not None else encoder.visual_projection.weight.device
    work = _Work(
        classifier(encoder, bank),
        dataset,
        tuple(dict.fromkeys(families)),
        tuple(sorted(set(severities))),
        seed,
        device,
    )
    identity = _identity(encoder, bank, work) | {"weights": sha256}
    store = SampleStore(samples_dir, f"{Path(model_name).name}-{PROTOCOL}", work.severities, identity)
    with attack_mode(encoder):
        label = f"{model_name}: {PROTOCOL}"
        records = measure_all(store, work.ids(), work.measure, batch_size=batch_size, label=label, progress=progress)
    shared: dict[str, Any] = {
        "task": "corruption",
        "metric": "mean corruption accuracy",
        "model": model_name,
        "model_sha256": sha256,
        "dataset": dataset.name,
        "split": dataset.split,
        "protocol": PROTOCOL,
        "norm": "severity",
        "class_names": list(bank.class_names),
        "templates": list(bank.templates),
        "template_hash": bank.template_hash,
        "logit_scale": bank.logit_scale,
        "left_out": [name for name in (*FAMILIES, *EXTRA_FAMILIES) if name not in families],
        "seconds": time.time() - start,
        "versions": versions() | {_LIBRARY: version(_LIBRARY)},
    }
    dtype = str(encoder.visual_projection.weight.dtype).removeprefix("torch.")
    row = {"resolution": max(dataset[0]["images"].shape[-2:]), "seed": seed, "dtype": dtype}
    return [
        RobustnessResult(
            **shared,
            eps=float(severity),
            samples=store.names[place] if samples_dir is not None else None,
            **_summary(work, [records[name][place] for name in work.ids()], row | {"severity": severity}),
        )
        for place, severity in enumerate(work.severities)
    ]


@dataclass(frozen=True)
class _Work:
    """Every image under every family at every severity; the unit is one image under one family."""

    classify: Callable[[Tensor], Tensor]
    dataset: LabelledImages
    families: tuple[str, ...]
    severities: tuple[int, ...]
    seed: int
    device: torch.device

    def ids(self) -> list[SampleId]:
        """One family after the other."""
        return [f"{family}/{sample}" for family in self.families for sample in self.dataset.ids]

    def measure(self, places: list[int]) -> Records:
        """Records of some places of `ids`, one per severity."""
        families = [self.families[place // len(self.dataset)] for place in places]
        batch = collate_images([self.dataset[place % len(self.dataset)] for place in places])
        images, labels, samples = check_images(batch["images"]), batch["labels"].tolist(), batch["ids"].tolist()
        clean, _ = self._answers(images, batch["labels"])
        names: list[SampleId] = [f"{family}/{sample}" for family, sample in zip(families, samples)]
        records: Records = {name: [] for name in names}
        for severity in self.severities:
            corrupted = [
                corrupt(image, family, severity, seed=self.seed, sample=sample)
                for image, family, sample in zip(images, families, samples)
            ]
            answers, scores = self._answers(torch.stack(corrupted), batch["labels"])
            for row, name in enumerate(names):
                # A hit on the corrupted image is a hit, whatever the clean one was taken for.
                blame = "clean" if clean[row] != labels[row] else families[row]
                fooled_by = None if answers[row] == labels[row] else blame
                records[name].append(
                    SampleRecord(name, labels[row], clean[row], answers[row], round(scores[row], 6), fooled_by)
                )
        return records

    def _answers(self, images: Tensor, labels: Tensor) -> tuple[list[int], list[float]]:
        with torch.no_grad():
            logits = self.classify(images.to(self.device))
        return logits.argmax(1).tolist(), Margin(lambda found: found, labels.to(self.device))(logits).tolist()


def _summary(work: _Work, records: Sequence[SampleRecord], row: dict[str, Any]) -> dict[str, Any]:
    """Accuracies of one severity; `records` are in the order of `work.ids()`."""
    count = len(work.dataset)
    rows = []
    for place, family in enumerate(work.families):
        hits = sum(record.robust_hit for record in records[place * count : (place + 1) * count])
        interval = list(wilson_interval(hits, count))
        rows.append({"name": family} | row | {"accuracy": hits / count, "ci95": interval})
    # Not `clean_hit`: it reads the blame, which a hit on the corrupted image has none of.
    clean = sum(record.clean == record.label for record in records[:count])
    mean = sum(record.robust_hit for record in records) / len(records)
    return {
        "num_samples": count,
        "clean_accuracy": clean / count,
        "robust_accuracy": mean,
        "attacks": rows,
        "ci95": {
            "clean_accuracy": list(wilson_interval(clean, count)),
            # The families share their images: as wide as if all families agreed on each image, so never too narrow.
            "robust_accuracy": list(wilson_interval(mean * count, count)),
        },
    }


def _identity(encoder: Encoder, bank: TextBank, work: _Work) -> dict[str, Any]:
    """What decides the answers."""
    dataset = work.dataset
    return {
        "data": [dataset.name, dataset.split, getattr(dataset.rows, "_fingerprint", "")],
        "samples": list(zip(dataset.ids, dataset.labels())),
        "pixels": [asdict(encoder.transform), asdict(dataset.transform)],
        "config": {name: encoder.config.to_dict().get(name) for name in ("vision_config", "hidden_act")},
        "dtype": str(encoder.visual_projection.weight.dtype),
        "text": [bank.template_hash, bank.logit_scale, tensor_sha256(bank.embeddings)],
        "corruptions": [work.families, work.severities, work.seed],
        "versions": [__version__, version(_LIBRARY)],
    }


def _library() -> Any:
    try:
        version(_LIBRARY)  # the unkept package of the same import name does not run beside a current numpy
        import imagecorruptions
    except (PackageNotFoundError, ModuleNotFoundError) as error:
        raise ModuleNotFoundError(
            f'corruptions need the package {_LIBRARY}: pip install "hf-robust-vision[corruptions]"'
        ) from error
    return imagecorruptions


def _check_choice(library: Any, families: Sequence[str], severities: Sequence[int]) -> None:
    known = [name for name in (*FAMILIES, *EXTRA_FAMILIES) if name in library.corruption_dict]
    if not families or any(name not in known for name in families):
        raise ValueError(f"unknown corruption in {list(families)}; choose out of {', '.join(known)}.")
    if not severities or any(severity not in SEVERITIES for severity in severities):
        raise ValueError(f"severities must be whole numbers from 1 to 5, got {list(severities)}.")


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Numpy's global generator, seeded and then put back."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
