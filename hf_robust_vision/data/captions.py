"""Images with captions: a gallery that text searches, and captions that images search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_robust_vision.pixels import PixelTransform

from .datasets import need_columns
from .decode import decode_image, undecoded


class CaptionedImages:
    """A gallery of captioned images; fewer than two, or one without a caption, are a ValueError.

    Args:
        rows: Any sequence of mappings with an image and its caption or captions, such as a `datasets.Dataset`.
        transform: Fits each image to the tower.
        name: Of the dataset, for results, as is `split`.
        caption_column: Key of a text or a list of texts.
    """

    def __init__(
        self,
        rows: Any,
        transform: PixelTransform,
        *,
        name: str,
        split: str,
        image_column: str = "image",
        caption_column: str = "captions",
    ):
        if len(rows) < 2:
            raise ValueError(f"retrieval needs at least 2 images, {name} ({split}) holds {len(rows)}.")
        need_columns(getattr(rows, "column_names", None) or rows[0], image_column, caption_column)
        self.rows, self.transform, self.name, self.split = undecoded(rows, image_column), transform, name, split
        self.image_column = image_column
        self.captions: list[str] = []  # of all images, in their order
        self.owners: list[int] = []  # for each caption the place of its image
        # A `datasets.Dataset` gives a column without decoding its images.
        texts = rows[caption_column] if hasattr(rows, "column_names") else [row[caption_column] for row in rows]
        for place, value in enumerate(texts):
            own: Sequence[str] = [value] if isinstance(value, str) else list(value)
            if not own:
                raise ValueError(f"image {place} of {name} has no caption, so nothing should find it.")
            self.captions += own
            self.owners += [place] * len(own)

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, place: int) -> Tensor:
        """One image in [0, 1], shape (3, height, width)."""
        decoded = decode_image(self.rows[place][self.image_column], f"image {place} of {self.name}")
        return self.transform.fit(decoded[None])[0]
