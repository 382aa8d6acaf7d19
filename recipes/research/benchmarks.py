"""The zero-shot tasks on which methods are compared, each with classes that a fine-tuning does not see."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.demo import CLASS_NAMES, DEMO_EPS, UNSEEN, demo_checkpoint, load_demo
from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.data.splits import only_classes, relabel
from hf_robust_vision.data.templates import read_class_names
from hf_robust_vision.pixels import PixelTransform


@dataclass(frozen=True)
class Benchmark:
    """What a comparison of methods is made on.

    Args:
        name: For results.
        about: What the images are, for the page.
        checkpoint: Folder of the CLIP that every method starts from; it knows all classes.
        class_names: What the zero-shot classifier chooses among, in the order of the labels.
        unseen: Classes of which neither images nor names take part in fine-tuning.
        templates: Of the prompts, by name.
        attack_eps: Radius of the attack in fine-tuning, pixels in [0, 1].
        eps: Radii that are measured.
        load: From the name of a split and a transform to its images.
        fingerprint: Hash of the checkpoint, and of the data where they are not part of a package.
    """

    name: str
    about: str
    checkpoint: Path
    class_names: tuple[str, ...]
    unseen: tuple[str, ...]
    templates: str
    attack_eps: float
    eps: tuple[float, ...]
    load: Callable[[str, PixelTransform], LabelledImages]
    fingerprint: str

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Class names that are fine-tuned on ("seen") and those that are held out ("unseen")."""
        return {"seen": tuple(name for name in self.class_names if name not in self.unseen), "unseen": self.unseen}

    def measured(self, split: str, transform: PixelTransform) -> dict[str, LabelledImages]:
        """The images of each group, all to be told among all class names."""
        images = self.load(split, transform)
        return {group: only_classes(images, names) for group, names in self.groups().items()}

    @property
    def identity(self) -> list[str]:
        """What tells it from another benchmark."""
        return [self.fingerprint, *self.class_names]

    def training_images(self, transform: PixelTransform) -> LabelledImages:
        """What a fine-tuning may see: the images of the seen classes, as a dataset that knows no other name.

        Args:
            transform: Fits each image to the tower.
        """
        return relabel(self.load("train", transform), self.groups()["seen"])


def demo_benchmark() -> Benchmark:
    """The shapes of easy-vqa: 24 names, and six colour-shape combinations held out."""
    return Benchmark(
        name="demo",
        about="the demo",
        checkpoint=demo_checkpoint(),
        class_names=CLASS_NAMES,
        unseen=UNSEEN,
        templates="demo",
        attack_eps=DEMO_EPS,
        eps=_radii(1, 2, 4, 8, 16),
        load=load_demo,
        fingerprint=fingerprint(demo_checkpoint() / "model.safetensors"),
    )


def emoji_benchmark(data: Path, model: Path) -> Benchmark:
    """Emoji in two drawing styles: many names, near and far, and a quarter of them held out.

    Fine lines and small differences: at 8/255, the demo's radius, little is left to save, so the attack in
    fine-tuning is half of it.

    Args:
        data: Folder that `recipes/research/prepare_emoji.py` wrote.
        model: Folder that `recipes/research/pretrain_emoji_clip.py` wrote.

    Raises:
        ValueError: If one of the folders is not what it should be.
    """
    for file, recipe in ((data / "unseen.txt", "prepare_emoji"), (model / "model.safetensors", "pretrain_emoji_clip")):
        if not file.is_file():
            raise ValueError(f"{file.parent} has no {file.name}; make the folder with python recipes/{recipe}.py.")
    load = partial(load_labelled_images, data)
    names = load("test", PixelTransform(64, (64, 64))).class_names
    return Benchmark(
        name="emoji",
        about="[emoji in two drawing styles](emoji.md), in skin tones that no training saw of them",
        checkpoint=model,
        class_names=tuple(names),
        unseen=tuple(read_class_names(data / "unseen.txt")),
        templates="emoji",
        attack_eps=4 / 255,
        eps=_radii(1, 2, 4, 8),
        load=load,
        fingerprint=fingerprint(*sorted(data.rglob("*.arrow")), data / "unseen.txt", model / "model.safetensors"),
    )


def _radii(*steps: int) -> tuple[float, ...]:
    return tuple(step / 255 for step in steps)


def fingerprint(*files: Path) -> str:
    """First 16 hex digits of a hash of the files' contents."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]
