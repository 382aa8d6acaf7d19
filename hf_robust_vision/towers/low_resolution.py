"""Attack steps that look at a smaller view of an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .dual import PooledEncoder


class LowResolution:
    """Lets a CLIP or SigLIP tower see images at a smaller size, while it is told to.

    Pixel values are resized inside, bilinear and antialiased, and the tower interpolates its position embeddings. What goes
    in keeps its size, and so does the gradient at it: that of the resize lies between.

    Args:
        encoder: The tower.
        side: Of the view in pixels, a multiple of its patch size.

    Raises:
        ValueError: If the encoder is another kind of tower, or `side` is no such size.

    Reference:
        Training on smaller images, with positions interpolated: CLIPA, https://huggingface.co/papers/2305.07017. That an
        attack alone looks at them is ours.
    """

    def __init__(self, encoder: Any, side: int):
        embeddings = encoder.vision_model.embeddings if isinstance(encoder, PooledEncoder) else None
        if embeddings is None or not hasattr(embeddings, "interpolate_pos_encoding"):
            raise ValueError(
                "attack_resolution needs the tower of a CLIP or a SigLIP, which interpolates its positions, got "
                f"{type(encoder).__name__}; leave it out."
            )
        size, patch = encoder.image_size, embeddings.patch_size
        if side % patch or not 0 < side < size:
            raise ValueError(
                f"attack_resolution={side} is no smaller view of {size} pixels in patches of {patch}; type a multiple of "
                f"{patch} below {size}, such as --attack_resolution {max(size // 2 // patch, 1) * patch}."
            )
        tokens = [encoder.class_tokens + (pixels // patch) ** 2 for pixels in (side, size)]
        self.cost = tokens[0] / tokens[1]  # share of all tokens that a pass reads
        self.side, self.awake = side, False
        # For good, and asleep: hooks that come and go would have the encoder compiled anew at every step.
        embeddings.register_forward_pre_hook(self._shrink, with_kwargs=True)

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Inside, the tower sees the smaller view."""
        self.awake = True
        try:
            yield
        finally:
            self.awake = False

    def of(self, objective: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """An objective by this encoder, images in [0, 1] of full size to one loss each, on the smaller view."""

        def small(images: Tensor) -> Tensor:
            with self.seen():
                return objective(images)

        return small

    def _shrink(self, module: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
        if not self.awake:
            return None
        (pixel_values,) = inputs
        size = (self.side, self.side)
        view = F.interpolate(pixel_values, size, mode="bilinear", antialias=True, align_corners=False)
        return (view,), options | {"interpolate_pos_encoding": True}
