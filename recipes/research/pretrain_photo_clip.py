"""Train a small CLIP on photos from scratch, in about two hours on one core.

    python recipes/research/pretrain_photo_clip.py --data PHOTOS --output_dir outputs/photo-clip

It is a genuine `CLIPModel` of 1 M parameters for 64 px. PHOTOS holds the folders `tiny-imagenet`, `cifar10` and
`caltech101`, each as `load_dataset` reads it, with the splits "train" and "test". The model learns from the training
splits alone, less a seeded part that is held out for validation; the test splits serve for the last line.

The run may be killed at any moment: the same command goes on from the last checkpoint, and what comes out is what an
unbroken run gives. Everything random is drawn from (seed, purpose, step), so a checkpoint needs no generator's state.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from small_clip import (
    SIZE,
    TRANSFORM,
    accuracy,
    build_model,
    build_processor,
    build_tokenizer,
    contrastive_loss,
    training_parser,
)
from torch import Tensor
from transformers import set_seed

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.data.templates import TEMPLATES
from hf_robust_vision.towers.dual import DualEncoder
from hf_robust_vision.towers.load import as_encoder, load_encoder


SETS = ("tiny-imagenet", "cifar10", "caltech101")
REPEATS = {"caltech101": 3}  # times that a small set's photos are seen in an epoch; 1 for the others
HELD_OUT = 0.03  # of each training split, for validation
PROMPTS = (*TEMPLATES["photo"], *TEMPLATES["tecoa"], "a photo of the {}.", "a picture of a {}.", "a {}.", "{}")
LOG_EVERY = 100  # steps


@dataclass
class Photos:
    """The photos of one split of all sets, one set after the other.

    Args:
        sets: The data sets in the order of `SETS`.
        images: Whole numbers from 0 to 255, shape (photos, 3, 64, 64), mapped from a file.
        labels: Into the class names of a photo's own set, shape (photos,).
    """

    sets: Sequence[LabelledImages]
    images: np.ndarray
    labels: Tensor

    @classmethod
    def load(cls, data: Path, split: str, cache: Path) -> Photos:
        """Read one split of all sets; photos are decoded once, into `cache`."""
        sets = [load_labelled_images(data / name, split, TRANSFORM) for name in SETS]
        labels = torch.tensor([label for part in sets for label in part.labels()])
        return cls(sets, decode(sets, cache / f"{split}.npy"), labels)

    def rows_of_sets(self) -> list[Tensor]:
        """The rows of each set."""
        return list(torch.arange(len(self.labels)).split([len(part) for part in self.sets]))

    def read(self, rows: Tensor) -> Tensor:
        """Photos in [0, 1]."""
        return torch.from_numpy(self.images[rows.numpy()]).float() / 255

    def part(self, rows: Tensor) -> dict[str, Tensor]:
        """Photos and labels, as `accuracy` takes them."""
        return {"images": self.read(rows), "labels": self.labels[rows]}


def decode(sets: Sequence[LabelledImages], file: Path) -> np.ndarray:
    """The images of all sets as whole numbers, read from `file` if it is there.

    Raises:
        ValueError: If the file was made from other data.
    """
    count = sum(map(len, sets))
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        images = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, 3, SIZE, SIZE))
        for row, item in enumerate(chain(*sets)):
            images[row] = (item["images"] * 255).round().byte().numpy()
        images.flush()
        partial.replace(file)
    images = np.load(file, mmap_mode="r")
    if len(images) != count:
        raise ValueError(f"{file} holds {len(images)} images, the data {count}; delete it.")
    return images


def merge_classes(tokenizer: Any, sets: Sequence[LabelledImages]) -> tuple[list[str], list[Tensor]]:
    """One list of classes for all sets: names that the tokenizer reads alike are one class.

    Returns:
        A name of each class, and for each set the class of each of its labels.

    Raises:
        ValueError: If two names of one set are read alike, or a prompt of a name does not fit.
    """
    names: list[str] = []
    found: dict[tuple[int, ...], int] = {}
    classes = []
    for part in sets:
        keys = [tuple(tokenizer(name)["input_ids"]) for name in part.class_names]
        if len(set(keys)) < len(keys):
            raise ValueError(f"two class names of {part.name} are the same to the tokenizer.")
        for key, name in zip(keys, part.class_names):
            longest = max(len(tokenizer(prompt.format(name))["input_ids"]) for prompt in PROMPTS)
            if tokenizer.unk_token_id in key or longest > tokenizer.model_max_length:
                raise ValueError(f"the tokenizer can not hold the class name {name!r} of {part.name}.")
            if key not in found:
                found[key] = len(names)
                names.append(name)
        classes.append(torch.tensor([found[key] for key in keys]))
    return names, classes


def hold_out(rows: Sequence[Tensor], seed: int, share: float = HELD_OUT) -> tuple[list[Tensor], list[Tensor]]:
    """Split the rows of each set into those to train on and a seeded share to choose on."""
    shuffled = [part[torch.randperm(len(part), generator=generator_of(seed, "hold out", 0))] for part in rows]
    counts = [max(1, round(share * len(part))) for part in rows]
    train = [part[count:] for part, count in zip(shuffled, counts)]
    return train, [part[:count] for part, count in zip(shuffled, counts)]


def generator_of(seed: int, purpose: str, step: int) -> torch.Generator:
    """A generator of its own for each purpose and step."""
    sequence = np.random.SeedSequence([seed, *purpose.encode(), step])
    return torch.Generator().manual_seed(int(sequence.generate_state(1)[0]))


def augment_photos(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cut out a random part, resize it to the whole, mirror half of the images and change their colours.

    The part has 35 to 100 % of the area and an aspect of 3/4 to 4/3; brightness, contrast and saturation change by up
    to 30 %.

    Args:
        images: In [0, 1], shape (batch, 3, 64, 64).
        generator: Draws what happens to each image.
    """

    def draw(low: float, high: float) -> Tensor:
        return torch.empty(len(images)).uniform_(low, high, generator=generator)

    area, aspect = draw(0.35, 1), draw(math.log(3 / 4), math.log(4 / 3)).exp()
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    mirror = 1 - 2 * (draw(0, 1) < 0.5).float()
    zeros = torch.zeros(len(images))
    across = torch.stack([width * mirror, zeros, draw(-1, 1) * (1 - width)], 1)
    down = torch.stack([zeros, height, draw(-1, 1) * (1 - height)], 1)
    grid = F.affine_grid(torch.stack([across, down], 1), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    brightness, contrast, saturation = (draw(0.7, 1.3).view(-1, 1, 1, 1) for _ in range(3))
    images = torch.lerp(images.mean(1, keepdim=True), images, saturation)
    images = torch.lerp(images.mean((1, 2, 3), keepdim=True), images, contrast)
    return (images * brightness).clamp(0, 1)


class Pretraining:
    """A run that is a function of its settings: `step` counts the updates that the weights have seen.

    Args:
        encoder: Freshly initialised.
        tokenizer: Knows the words of prompts and class names.
        photos: The training splits.
        args: Of the command line.
    """

    def __init__(self, encoder: DualEncoder, tokenizer: Any, photos: Photos, args: argparse.Namespace):
        self.encoder, self.tokenizer, self.photos = encoder, tokenizer, photos
        self.seed, self.batch_size, self.peak = args.seed, args.batch_size, args.learning_rate
        self.names, classes = merge_classes(tokenizer, photos.sets)
        rows = photos.rows_of_sets()
        self.classes = torch.cat([merged[photos.labels[part]] for merged, part in zip(classes, rows)])
        train, self.validation = hold_out(rows, args.seed)
        self.rows = torch.cat([part.repeat(REPEATS.get(name, 1)) for name, part in zip(SETS, train)])
        self.per_epoch = len(self.rows) // self.batch_size
        self.steps = args.max_steps if args.max_steps > 0 else args.epochs * self.per_epoch
        self.warm_up = min(500, max(self.steps // 10, 1))
        self.optimizer = torch.optim.AdamW(encoder.parameters(), lr=self.peak, weight_decay=0.05)
        names = ("epochs", "max_steps", "batch_size", "learning_rate", "seed", "width")
        self.settings = {name: getattr(args, name) for name in names}
        self.step, self.cpu_seconds = 0, 0.0

    def save_state(self, file: Path) -> None:
        """Write all that an unbroken run would know; a kill leaves the old file or the new one."""
        partial = file.with_suffix(".partial")
        state = {name: getattr(self, name) for name in ("settings", "step", "cpu_seconds")}
        state |= {"encoder": self.encoder.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, partial)
        partial.replace(file)

    def load_state(self, file: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it is of a run with other settings.
        """
        state = torch.load(file, weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{file} is of a run with {state['settings']}; choose another --output_dir.")
        self.encoder.load_state_dict(state["encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]

    def batch(self) -> tuple[Tensor, Tensor]:
        """Augmented photos and their classes, of all sets mixed."""
        epoch, place = divmod(self.step, self.per_epoch)
        order = torch.randperm(len(self.rows), generator=generator_of(self.seed, "order", epoch))
        rows = self.rows[order[place * self.batch_size :][: self.batch_size]]
        images = augment_photos(self.photos.read(rows), generator_of(self.seed, "augment", self.step))
        return images, self.classes[rows]

    def update(self) -> float:
        """One step on one batch against all class names, each in a prompt drawn anew; the loss."""
        images, classes = self.batch()
        generator = generator_of(self.seed, "prompts", self.step)
        drawn = torch.randint(0, len(PROMPTS), (len(self.names),), generator=generator).tolist()
        captions = self.encoder.tokenize(
            self.tokenizer, [PROMPTS[t].format(name) for t, name in zip(drawn, self.names)]
        )
        with torch.autocast("cpu", torch.bfloat16):
            output = self.encoder(images, captions)
        image_embeds, text_embeds = (F.normalize(e.float(), dim=-1) for e in (output.image_embeds, output.text_embeds))
        logits = self.encoder.logit_scale.clamp(max=math.log(100)).exp() * image_embeds @ text_embeds.T
        loss = contrastive_loss(logits, classes, torch.arange(len(self.names)))
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss of step {self.step} is {loss.item()}; a lower --learning_rate may help."
            )
        rise, fall = (self.step + 1) / self.warm_up, 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * min(rise, fall)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.encoder.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.item()

    def run(self, state: Path, minutes: float) -> None:
        """Train to the end, print a line now and then, write `state` every so many minutes and at the end."""
        saved = shown = time.time()
        cpu, losses = time.process_time(), []
        while self.step < self.steps:
            losses.append(self.update())
            ends_epoch = self.step % self.per_epoch == 0 or self.step == self.steps
            if self.step % LOG_EVERY == 0 or ends_epoch:
                seconds, used = time.time() - shown, time.process_time() - cpu
                self.cpu_seconds += used
                images = len(losses) * self.batch_size
                print(
                    f"step {self.step}/{self.steps}  loss {np.mean(losses):.3f}  images/s {images / seconds:.0f}  "
                    f"images per CPU s {images / used:.0f}  CPU h {self.cpu_seconds / 3600:.2f}",
                    flush=True,
                )
                shown, cpu, losses = time.time(), time.process_time(), []
            if ends_epoch:
                print(f"epoch {self.step / self.per_epoch:.0f}  validation {self.scores(self.photos)}", flush=True)
            if time.time() - saved >= 60 * minutes or self.step == self.steps:
                self.save_state(state)
                saved = time.time()

    def scores(self, photos: Photos, rows: Sequence[Tensor] | None = None) -> str:
        """Zero-shot accuracy in each set among its own class names, on the validation part or on given rows."""
        found = []
        for part, chosen in zip(photos.sets, rows or self.validation):
            score = accuracy(self.encoder, self.tokenizer, photos.part(chosen), part.class_names, TEMPLATES["photo"])
            found.append(f"{part.name} {score:.3f}")
        return "  ".join(found)


def main() -> None:
    """Train or go on training, save a stock folder in half precision, print its accuracies on the test splits."""
    parser = training_parser(__doc__, output_dir="outputs/photo-clip", epochs=18)
    parser.add_argument("--data", type=Path, required=True, help=f"folder that holds {', '.join(SETS)}")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--checkpoint_minutes", type=float, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(args.seed)
    photos = Photos.load(args.data, "train", args.output_dir / "cache")
    tokenizer = build_tokenizer(PROMPTS, [name for part in photos.sets for name in part.class_names])
    encoder = as_encoder(build_model(tokenizer, patch=8, width=args.width, layers=6))
    # In bfloat16 the backward pass of the fused attention takes half of the whole time on a CPU.
    encoder.set_attn_implementation("eager")
    pretraining = Pretraining(encoder, tokenizer, photos, args)
    state = args.output_dir / "state.pt"
    if state.is_file():
        pretraining.load_state(state)
    classes, steps = len(pretraining.names), pretraining.steps
    print(
        f"{len(pretraining.rows)} photos an epoch, {classes} classes, from step {pretraining.step} of {steps}",
        flush=True,
    )
    pretraining.run(state, args.checkpoint_minutes)
    folder = args.output_dir / "model"
    encoder.half().save_pretrained(folder)
    build_processor(tokenizer).save_pretrained(folder)
    pretraining.encoder = load_encoder(folder)  # what is tested is what lies on the disk
    test = Photos.load(args.data, "test", args.output_dir / "cache")
    print(
        f"test {pretraining.scores(test, test.rows_of_sets())}  {pretraining.cpu_seconds / 3600:.2f} CPU h", flush=True
    )


if __name__ == "__main__":
    main()
