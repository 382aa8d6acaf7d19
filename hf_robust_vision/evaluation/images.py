"""Adversarial images on disk, and the reported numbers measured again from them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_robust_vision.attacks import make_ball
from hf_robust_vision.pixels import check_images
from hf_robust_vision.towers.clip import Encoder, attack_mode, image_embedder, weights_sha256
from hf_robust_vision.towers.text_bank import TextBank

from .results import RobustnessResult, SampleRecord, load_samples


CLEAN = "clean"


class AdversarialImages:
    """A folder of `<sample id>.safetensors`: the clean image, and the one found at each radius that was attacked.

    The values are the floats that fooled the model: rounded to the 256 steps of a picture file, an image may leave its
    ball, or no longer fool. A sample that fell at a smaller radius has no image of its own at the larger ones: their
    balls hold the smaller one's. One that was wrong before has its clean image only.

    Args:
        folder: Made at the first write.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __contains__(self, sample: int) -> bool:
        return self._path(sample).is_file()

    def ids(self) -> list[int]:
        """The samples whose images are there."""
        return sorted(int(path.stem) for path in self.folder.glob("*.safetensors"))

    def write(self, sample: int, clean: Tensor, found: Mapping[float, Tensor]) -> None:
        """Keep the images of one sample, whole or not at all.

        Args:
            sample: Its id.
            clean: Image in [0, 1], shape (3, height, width).
            found: Radius to the image that the attacks ended with.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        images = {CLEAN: clean} | {repr(eps): image for eps, image in found.items()}
        draft = self._path(sample).with_suffix(f".{os.getpid()}")
        save_file({name: image.detach().cpu().clone() for name, image in images.items()}, draft)
        draft.replace(self._path(sample))

    def read(self, sample: int, eps: float) -> tuple[Tensor, Tensor]:
        """Clean and adversarial image of one sample at a radius; twice the clean one where nothing was attacked.

        Raises:
            FileNotFoundError: If the images of this sample were not saved.
        """
        if sample not in self:
            raise FileNotFoundError(f"no image of sample {sample} in {self.folder}.")
        with safe_open(self._path(sample), framework="pt") as file:
            radii = [float(name) for name in file.keys() if name != CLEAN and float(name) <= eps]  # noqa: SIM118
            clean = file.get_tensor(CLEAN)
            return clean, file.get_tensor(repr(max(radii))) if radii else clean

    def _path(self, sample: int) -> Path:
        return self.folder / f"{sample}.safetensors"


@dataclass(frozen=True)
class Remeasured:
    """What the saved images of one result say.

    Args:
        num_samples: Samples whose images were saved.
        clean_accuracy: On their clean images, measured again.
        robust_accuracy: On their adversarial images, measured again.
        reported: Robust accuracy of the same samples by the records of the result.
        changed: Ids whose flags, clean or robust, differ from the records. A logit within rounding of another may
            flip in a batch of another size.
        farthest: Largest perturbation, in the norm and the unit of the result's eps.
        outside: Ids whose image lies outside the ball or outside [0, 1].
    """

    num_samples: int
    clean_accuracy: float
    robust_accuracy: float
    reported: float
    changed: list[int]
    farthest: float
    outside: list[int]


def remeasure(
    encoder: Encoder, bank: TextBank, result: RobustnessResult, folder: str | Path, *, batch_size: int = 64
) -> Remeasured:
    """Classify the saved images of a zero-shot result again, without any attack, and compare with what was reported.

    Args:
        encoder: The model that was measured, in the dtype that it was measured in.
        bank: Its classifier: `make_text_bank` on the class names and templates of the result.
        result: With saved images.
        folder: Where the `robustness.json` of the result lies.
        batch_size: Images classified at once.

    Raises:
        ValueError: If the model or the classifier is another, or no images were saved.
    """
    need_task(result, "zero_shot")
    if bank.template_hash != result.template_hash:
        raise ValueError("the bank has other class names or templates than the result; build it from the result's.")
    embed, device = image_embedder(encoder), encoder.visual_projection.weight.device
    classify = bank.classify(lambda batch: embed(encoder.transform.fit(batch)))

    def hits(records: Sequence[SampleRecord], images: Tensor) -> list[bool]:
        labels = torch.tensor([record.label for record in records], device=device)
        with torch.no_grad(), attack_mode(encoder):
            flags: list[bool] = (classify(check_images(images).to(device)).argmax(1) == labels).tolist()
        return flags

    return measure_again(result, folder, weights_sha256(encoder), hits, batch_size=batch_size)


def measure_again(
    result: RobustnessResult,
    folder: str | Path,
    sha256: str,
    hits: Callable[[Sequence[SampleRecord], Tensor], list[bool]],
    *,
    told: Callable[[SampleRecord], tuple[bool, bool]] = lambda record: (record.clean_hit, record.robust_hit),
    batch_size: int = 1,
) -> Remeasured:
    """Look at the saved images of a result again, and compare with its records.

    Args:
        result: With saved images.
        folder: Where its `robustness.json` lies.
        sha256: Of the weights that look.
        hits: Records and their images to what is right, whatever the task calls right.
        told: A record to its flags, clean and robust.
        batch_size: Images looked at once; they must be of one size.

    Raises:
        ValueError: If the weights are others, or no images were saved.
    """
    images, records = _saved(result, Path(folder))
    if sha256 != result.model_sha256:
        raise ValueError(
            f"{result.model} was measured with weights {result.model_sha256[:16]}, these are {sha256[:16]}."
        )
    ball = make_ball(result.norm, result.eps)
    ids = [sample for sample in images.ids() if sample in records]
    clean_hits, robust_hits, outside, farthest = [], [], [], 0.0
    for start in range(0, len(ids), batch_size):
        rows = ids[start : start + batch_size]
        clean, adversarial = (torch.stack(part) for part in zip(*(images.read(row, result.eps) for row in rows)))
        distance = ball.distance(adversarial, clean)
        farthest = max(farthest, distance.max().item())
        inside = (distance <= ball.eps * (1 + 1e-5) + 1e-7) & ((adversarial >= 0) & (adversarial <= 1)).flatten(1).all(
            1
        )
        outside += [row for row, fits in zip(rows, inside.tolist()) if not fits]
        looked = [records[row] for row in rows]
        right = hits(looked, clean)
        clean_hits += right
        robust_hits += [one and other for one, other in zip(right, hits(looked, adversarial))]
    flags = [told(records[row]) for row in ids]
    changed = [row for row, said, seen in zip(ids, flags, zip(clean_hits, robust_hits)) if said != seen]
    return Remeasured(
        num_samples=len(ids),
        clean_accuracy=sum(clean_hits) / len(ids),
        robust_accuracy=sum(robust_hits) / len(ids),
        reported=sum(robust for _, robust in flags) / len(ids),
        changed=changed,
        farthest=farthest,
        outside=outside,
    )


def need_task(result: RobustnessResult, task: str) -> None:
    """Refuse the result of another evaluator.

    Raises:
        ValueError: If it is one.
    """
    if result.task != task:
        raise ValueError(f"this measures {task} results again, the given one is of the task {result.task!r}.")


def _saved(result: RobustnessResult, folder: Path) -> tuple[AdversarialImages, dict[int, SampleRecord]]:
    images = AdversarialImages(folder / result.images) if result.images is not None else None
    if images is None or result.samples is None or not images.ids():
        raise ValueError(
            f"no images of {result.model} on {result.dataset} were saved; measure it with save_images=, or --save_adversarial."
        )
    return images, {int(record.id): record for record in load_samples(folder / result.samples)}
