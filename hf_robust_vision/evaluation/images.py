"""Adversarial images on disk, and the reported numbers measured again from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hf_robust_vision.attacks import make_ball
from hf_robust_vision.towers.base import attack_mode, weights_sha256

from .results import RobustnessResult, load_samples
from .task import Batch, SampleId, Task, one_size


CLEAN = "clean"
_TEXT = "~"  # begins the file of an id that is no number, whatever the id holds


class AdversarialImages:
    """A folder of one `.safetensors` a sample: the clean image, and the one found at each radius that was attacked.

    The values are the floats that fooled the model: rounded to the 256 steps of a picture file, an image may leave its
    ball, or no longer fool. A sample that fell at a smaller radius has no image of its own at the larger ones: their
    balls hold the smaller one's. One that was wrong before has its clean image only.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __contains__(self, sample: SampleId) -> bool:
        return self._path(sample).is_file()

    def ids(self) -> list[SampleId]:
        """The samples whose images are there, numbers first."""
        stems = sorted(path.stem for path in self.folder.glob("*.safetensors"))
        numbers: list[SampleId] = sorted(int(stem) for stem in stems if stem[0] != _TEXT)
        return numbers + [unquote(stem[1:]) for stem in stems if stem[0] == _TEXT]

    def write(self, sample: SampleId, clean: Tensor, found: Mapping[float, Tensor]) -> None:
        """Keep the images of one sample, whole or not at all; `found` is what the attacks ended with, by radius."""
        self.folder.mkdir(parents=True, exist_ok=True)
        images = {CLEAN: clean} | {repr(eps): image for eps, image in found.items()}
        # Renamed when it is whole: its record follows, and must not speak of half an image.
        draft = self._path(sample).with_suffix(f".{os.getpid()}")
        save_file({name: image.detach().cpu().clone() for name, image in images.items()}, draft)
        draft.replace(self._path(sample))

    def read(self, sample: SampleId, eps: float) -> tuple[Tensor, Tensor]:
        """Clean and adversarial image of one sample at a radius; twice the clean one where nothing was attacked."""
        if sample not in self:
            raise FileNotFoundError(f"no image of sample {sample} in {self.folder}.")
        with safe_open(self._path(sample), framework="pt") as file:
            radii = [float(name) for name in file.keys() if name != CLEAN and float(name) <= eps]  # noqa: SIM118
            clean = file.get_tensor(CLEAN)
            return clean, file.get_tensor(repr(max(radii))) if radii else clean

    def _path(self, sample: SampleId) -> Path:
        # An id may hold what no file name can; a number needs no mark, so that 7 and "7" differ.
        stem = str(sample) if isinstance(sample, int) else _TEXT + quote(sample, safe=" ")
        return self.folder / f"{stem}.safetensors"


@dataclass(frozen=True)
class Remeasured:
    """What the saved images of one result say, measured again."""

    num_samples: int  # whose images were saved
    clean_accuracy: float
    robust_accuracy: float
    reported: float  # robust accuracy of the same samples by the records of the result
    # Ids whose flags differ from the records. A logit within rounding of another may flip in a batch of another size.
    changed: list[SampleId]
    farthest: float  # largest perturbation, in the norm and the unit of the result's eps
    outside: list[SampleId]  # whose image lies outside the ball or outside [0, 1]


def measure_again(task: Task, result: RobustnessResult, folder: str | Path, *, batch_size: int = 64) -> Remeasured:
    """Judge the saved images of a result again, without any attack, and compare with its records.

    `task` is what was measured, on the same samples; `folder` is where the `robustness.json` of the result lies.

    Raises:
        ValueError: If the result is of another task or of other weights, or no images were saved.
    """
    if result.task != task.task:
        raise ValueError(f"this measures {task.task} results again, the given one is of the task {result.task!r}.")
    images = AdversarialImages(Path(folder) / str(result.images))
    if result.images is None or result.samples is None or not images.ids():
        raise ValueError(
            f"no images of {result.model} on {result.dataset} were saved; measure it with save_images=, or "
            "--save_adversarial."
        )
    records = {record.id: record for record in load_samples(Path(folder) / result.samples)}
    if (sha256 := weights_sha256(task.model)) != result.model_sha256:
        raise ValueError(
            f"{result.model} was measured with weights {result.model_sha256[:16]}, these are {sha256[:16]}."
        )
    ball, places = make_ball(result.norm, result.eps), {sample: place for place, sample in enumerate(task.ids)}
    ids = [sample for sample in images.ids() if sample in records and sample in places]
    told = {sample: task.hits(records[sample], result.metric) for sample in ids}
    seen, outside, farthest = dict[SampleId, tuple[bool, bool]](), list[SampleId](), 0.0
    clean = ((places[sample], images.read(sample, result.eps)[0]) for sample in ids)
    for batch in one_size(clean, batch_size, task.weight.device):
        rows = [task.ids[place] for place in batch.places]
        # Not past `check_images`, as the clean ones: an image outside [0, 1] is to be counted, not to end the count.
        found = torch.stack([images.read(row, result.eps)[1] for row in rows]).to(batch.images.device)
        distance = ball.distance(found, batch.images)
        farthest = max(farthest, distance.max().item())
        within = ((found >= 0) & (found <= 1)).flatten(1).all(1)
        # An L2 projection ends at the radius up to rounding only.
        inside = (distance <= ball.eps * (1 + 1e-5) + 1e-7) & within
        outside += [row for row, fits in zip(rows, inside.tolist()) if not fits]
        right, stands = _right(task, batch, batch.images), _right(task, batch, found)
        seen |= {row: (one, one and other) for row, one, other in zip(rows, right, stands)}
    return Remeasured(
        num_samples=len(ids),
        clean_accuracy=sum(clean for clean, _ in seen.values()) / len(ids),
        robust_accuracy=sum(robust for _, robust in seen.values()) / len(ids),
        reported=sum(robust for _, robust in told.values()) / len(ids),
        changed=[sample for sample in ids if told[sample] != seen[sample]],
        farthest=farthest,
        outside=outside,
    )


@torch.no_grad()
def _right(task: Task, batch: Batch, images: Tensor) -> list[bool]:
    with attack_mode(task.model):
        return [not verdict.lost for verdict in task.judge(batch, images)]
