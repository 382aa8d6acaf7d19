"""Whether a model can be hardened and measured: loaded whole, and attacked from what it reads back to the pixels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hf_robust_vision.pixels import PixelTransform

from .base import weights_sha256
from .dual import DualEncoder
from .load import load_encoder
from .processors import load_tokenizer
from .stock import need_gradient
from .vlm import VLMEncoder
from .weights import reading


@dataclass(frozen=True)
class LoadCheck:
    """What `check_load` found."""

    model: str  # class of transformers
    kind: str  # "image and text towers", "vision tower" or "vision-language model"
    parameters: int  # of what is loaded: of a vision-language model tower and projector
    tower_parameters: int
    weights_sha256: str
    image_size: tuple[int, int]  # height and width under attack
    preprocessing: PixelTransform
    reads: str  # what is read of an image
    output_shape: tuple[int, ...]  # of it, for one image
    pixels_reached: float  # share of the pixels that have a gradient

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {"schema": 1, **asdict(self)}

    def __str__(self) -> str:
        pixels, (height, width) = self.preprocessing, self.image_size
        crop = "no crop" if pixels.crop is None else f"centre crop to {pixels.crop[0]} x {pixels.crop[1]}"
        resize = (
            f"shortest edge to {pixels.resize}" if isinstance(pixels.resize, int) else "{} x {}".format(*pixels.resize)
        )
        means, stds = (", ".join(f"{value:.3f}" for value in values) for values in (pixels.mean, pixels.std))
        return "\n".join(
            [
                f"{self.model}, {self.kind}: {self.parameters:,} weights, {self.tower_parameters:,} of them the vision "
                f"tower's; SHA-256 {self.weights_sha256[:16]}",
                f"images:   {height} x {width} under attack; resize ({pixels.mode}): {resize}, {crop}; mean {means}; std {stds}",
                f"reads:    {self.reads}, shape {self.output_shape}",
                f"gradient: reaches {self.pixels_reached:.1%} of the pixels",
            ]
        )


def check_load(name: str | Path, *, revision: str | None = None, resolution: int | None = None) -> LoadCheck:
    """Load a folder or Hub id as training and measuring do, and follow a gradient from what it reads to the pixels.

    Args:
        name: Of what `load_encoder` takes.
        revision: Branch, tag or commit on the Hub.
        resolution: See `as_encoder`.

    Raises:
        ValueError: If it can not be read whole, or no finite gradient comes back; the message says what to do.
    """
    with reading(name):
        encoder = load_encoder(name, revision=revision, resolution=resolution).eval()
        if isinstance(encoder, DualEncoder):
            load_tokenizer(name, revision=revision)
    vlm = isinstance(encoder, VLMEncoder)
    reads = "language_tokens" if vlm else "image_embeds"

    def read(images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = (encoder(images) if vlm else encoder.encode_images(images))[reads]
        return found

    images = encoder.probe()
    output, gradient = need_gradient(encoder, read, images, (str(name), "its image processor"))
    if not bool(gradient.isfinite().all()) or not bool(gradient.any()):
        what = "is 0 everywhere" if bool(gradient.isfinite().all()) else "is not finite"
        raise ValueError(f"the gradient at the pixels of {name} {what}: it can not be attacked. Check its weights.")
    whole = "image and text towers" if isinstance(encoder, DualEncoder) else "vision tower"
    return LoadCheck(
        model=encoder.stock_class.__name__,
        kind="vision-language model" if vlm else whole,
        parameters=sum(weight.numel() for weight in encoder.parameters()),
        tower_parameters=sum(weight.numel() for weight in encoder.tower.parameters()),
        weights_sha256=weights_sha256(encoder),
        image_size=(images.shape[-2], images.shape[-1]),
        preprocessing=encoder.transform,
        reads=reads,
        output_shape=tuple(output.shape),
        pixels_reached=float((gradient != 0).any(1).float().mean()),
    )
