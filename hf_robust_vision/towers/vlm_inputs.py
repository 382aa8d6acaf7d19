"""How vision-language models take images in [0, 1] and prompts: the processor's work, in differentiable torch.

What is done here is compared with the stock processor once, on a picture, before anything is measured with it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution

from hf_robust_vision.pixels import PixelTransform


KNOWN_OUTPUTS = {"input_ids", "attention_mask", "pixel_values", "pixel_values_images", "image_sizes"}
TOLERANCE = 3 / 255  # processors round resized pixels to 8 bits


class VLMInputs:
    """Base of the adapters: a model, its tokenizer, and how it sees images.

    A subclass says how prompts become tokens and images become what the model reads.

    Args:
        vlm: The model.
        tokenizer: Its tokenizer.
        transform: Resize, crop and normalisation.
    """

    def __init__(self, vlm: nn.Module, tokenizer: Any, transform: PixelTransform):
        self.vlm, self.tokenizer, self.transform = vlm, tokenizer, transform
        weight = next(parameter for parameter in vlm.parameters() if parameter.is_floating_point())
        self.device, self.dtype = weight.device, weight.dtype

    @property
    def resolution(self) -> int | str:
        """The size of the images under attack, for a result."""
        fitted = self.transform.crop or self.transform.resize
        return fitted if isinstance(fitted, int) else max(fitted)

    def identity(self) -> dict[str, Any]:
        """Plain values beside the weights that decide what the model says about an image."""
        config = getattr(self.vlm, "config", None)
        values = config.to_dict() if config is not None else {}
        generation = getattr(self.vlm, "generation_config", None)
        decoding = generation.to_dict() if generation is not None else {}
        plain = [{k: v for k, v in part.items() if k[0] != "_"} for part in (values, decoding)]
        return {"pixels": asdict(self.transform), "config": plain[0], "generation": plain[1]}

    def fit(self, images: Tensor) -> Tensor:
        """Images in [0, 1] of any size to the size at which they are attacked."""
        return self.transform.fit(images)

    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> list[list[int]]:
        """Token ids of prompts, with the places that images of this height and width take."""
        raise NotImplementedError

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        """Logits of the last `keep` places, shape (batch, keep, vocabulary), differentiable in the images."""
        raise NotImplementedError

    def generate(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Tensor:
        """Token ids that the model adds by greedy decoding, shape (batch, new)."""
        raise NotImplementedError


class SingleImageInputs(VLMInputs):
    """Stock models whose processor gives one image of fixed size: Llava, VipLlava, VideoLlava (images).

    Args:
        vlm: A stock model.
        processor: Its processor.

    Raises:
        TypeError: If the processor is none of images and text.
        ValueError: If the processor treats images in another way; its name and what differs are in the message.
    """

    def __init__(self, vlm: nn.Module, processor: Any):
        for part in ("image_processor", "tokenizer", "image_token"):
            if not hasattr(processor, part):
                raise TypeError(
                    f"wanted the processor of a vision-language model or a VLMInputs, got {type(processor).__name__} "
                    f"without {part}: load it with AutoProcessor.from_pretrained."
                )
        super().__init__(vlm, processor.tokenizer, PixelTransform.from_image_processor(processor.image_processor))
        self.processor = processor
        unknown, token = getattr(self.tokenizer, "unk_token_id", None), processor.image_token
        if unknown is not None and self.tokenizer.convert_tokens_to_ids(token) == unknown:
            raise ValueError(f"the tokenizer does not know the image token {token!r}: it belongs to another model.")
        self.keeps = "logits_to_keep" in inspect.signature(vlm.forward).parameters
        self.check()

    def pixels(self, images: Tensor) -> dict[str, Tensor]:
        """What the model reads of images in [0, 1]."""
        return {"pixel_values": self.transform.normalize(images).to(self.dtype)}

    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> list[list[int]]:
        """See `VLMInputs.encode`.

        Raises:
            ValueError: If a prompt has not exactly one image token.
        """
        blank, token = Image.new("RGB", size[::-1]), self.processor.image_token
        for prompt in prompts:
            if prompt.count(token) != 1:
                raise ValueError(f"the prompt {prompt!r} must hold the image token {token!r} once.")
        return [self.stock(blank, prompt)["input_ids"][0].tolist() for prompt in prompts]

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, keep: int) -> Tensor:
        """See `VLMInputs.logits`."""
        # A long prompt times a large vocabulary is gigabytes.
        few = {"logits_to_keep": keep} if self.keeps else {}
        output = self.vlm(input_ids=input_ids, attention_mask=attention_mask, **self.pixels(images), **few)
        logits: Tensor = output.logits[:, -keep:]
        return logits

    def generate(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Tensor:
        """See `VLMInputs.generate`."""
        vlm: Any = self.vlm
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        output: Tensor = vlm.generate(**text, **self.pixels(images), **greedy)
        return output[:, input_ids.shape[1] :]

    def stock(self, image: Image.Image, prompt: str) -> dict[str, Tensor]:
        """What the stock processor makes of an image and a prompt."""
        return dict(self.processor(images=image, text=prompt, return_tensors="pt"))

    def check(self) -> None:
        """Compare with the stock processor on a picture."""
        picture, images = ramps(*self._checked_size())
        encoded = self.stock(picture, self.processor.image_token)
        name = type(self.processor).__name__
        stock = encoded.get("pixel_values", encoded.get("pixel_values_images"))
        strange = sorted(set(encoded) - KNOWN_OUTPUTS)
        if stock is None or strange:
            raise ValueError(
                f"{name} gives {strange or 'no pixel_values'}, which this evaluator does not follow; it knows "
                "processors of the LLaVA family. For another model write a VLMInputs and pass it in place of the "
                "processor."
            )
        compare(self.pixels(self._checked_fit(images))["pixel_values"], stock, self.transform, name)

    def _checked_size(self) -> tuple[int, int]:
        fitted = self.transform.crop or self.transform.resize
        side = fitted if isinstance(fitted, int) else max(fitted)
        return side * 3 // 2 + 1, side * 2

    def _checked_fit(self, images: Tensor) -> Tensor:
        return self.fit(images).to(self.device)


class TiledInputs(SingleImageInputs):
    """Stock models that see an image as a whole and in tiles: LlavaNext, LlavaNextVideo (images).

    The attacked image is the one that is cut into tiles: resized, its shape kept, to the best of
    `image_grid_pinpoints`. Padding, tiles and the small view of the whole image are inside the attack. Given such an
    image, the stock processor makes the same tiles.
    """

    def __init__(self, vlm: nn.Module, processor: Any):
        grid = getattr(processor.image_processor, "image_grid_pinpoints", None)
        own = getattr(getattr(vlm, "config", None), "image_grid_pinpoints", None)
        if own is not None and [list(pair) for pair in own] != [list(pair) for pair in grid or ()]:
            raise ValueError(f"image_grid_pinpoints of the model are {own}, of its processor {grid}: make them equal.")
        self.grid = [list(pair) for pair in grid or ()]
        super().__init__(vlm, processor)

    @property
    def resolution(self) -> str:
        """The size of the images under attack, for a result."""
        return "best of image_grid_pinpoints, shape kept"

    @property
    def side(self) -> int:
        """Height and width of a tile."""
        fitted = self.transform.crop or self.transform.resize
        return fitted if isinstance(fitted, int) else fitted[0]

    def fit(self, images: Tensor) -> Tensor:
        """Images in [0, 1] of any size to the size at which they are attacked."""
        _, size = self._grid_size(images)
        return self._resized(images, size)

    def pixels(self, images: Tensor) -> dict[str, Tensor]:
        """What the model reads of images in [0, 1] that have one size."""
        (height, width), size = self._grid_size(images)
        above, left = (height - size[0]) // 2, (width - size[1]) // 2
        padding = (left, width - size[1] - left, above, height - size[0] - above)
        padded = F.pad(self._resized(images, size), padding)
        tiles = [self._resized(images, (self.side, self.side))]
        tiles += [
            padded[..., top : top + self.side, start : start + self.side]
            for top in range(0, height, self.side)
            for start in range(0, width, self.side)
        ]
        values = torch.stack([self.transform.normalize(self.transform.fit(tile)) for tile in tiles], dim=1)
        sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        return {"pixel_values": values.to(self.dtype), "image_sizes": sizes}

    def _grid_size(self, images: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """The resolution that fits best, and the size of the image in it."""
        height, width = images.shape[-2:]
        best = tuple(select_best_resolution((height, width), self.grid))
        if best[1] / width < best[0] / height:
            return best, (min(math.ceil(height * (best[1] / width)), best[0]), best[1])
        return best, (best[0], min(math.ceil(width * (best[0] / height)), best[1]))

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        return replace(self.transform, resize=size, crop=None).fit(images)

    def _checked_size(self) -> tuple[int, int]:
        return self.side * 3 // 2 + 1, self.side * 3 // 4

    def _checked_fit(self, images: Tensor) -> Tensor:
        return images.to(self.device)


def vlm_inputs(vlm: nn.Module, processor: Any) -> VLMInputs:
    """The adapter of a stock model and its processor; a `VLMInputs` of that model is returned as it is.

    Raises:
        TypeError: If the processor is none of images and text.
        ValueError: If the processor treats images in a way that is not followed here, or belongs to another model.
    """
    if isinstance(processor, VLMInputs):
        if processor.vlm is not vlm:
            raise ValueError(f"the {type(processor).__name__} was made for another model: make one for this model.")
        return processor
    tiled = getattr(getattr(processor, "image_processor", None), "image_grid_pinpoints", None) is not None
    return TiledInputs(vlm, processor) if tiled else SingleImageInputs(vlm, processor)


def ramps(height: int, width: int) -> tuple[Image.Image, Tensor]:
    """A picture that is different everywhere and smooth, so that any right resize gives nearly the same.

    Returns:
        The picture, and the same in [0, 1], shape (1, 3, height, width).
    """
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(0, 1, width)[None]
    shape = height, width
    channels = [rows.expand(shape), columns.expand(shape), (rows + 1 - columns) / 2]
    pixels = (torch.stack(channels, 2) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.numpy()), pixels.permute(2, 0, 1)[None] / 255


def compare(ours: Tensor, stock: Tensor, transform: PixelTransform, name: str) -> None:
    """Refuse to go on if pixel values differ from the stock processor's.

    Raises:
        ValueError: If the shapes differ, or the pixels by more than its rounding explains.
    """
    ours, stock = ours.detach().float().cpu(), stock.float().cpu()
    if ours.shape != stock.shape:
        raise ValueError(
            f"{name} gives pixel values of shape {tuple(stock.shape)}, this evaluator {tuple(ours.shape)}: its resize, "
            "crop or padding is not followed here. Write a VLMInputs and pass it in place of the processor."
        )
    side = (-1, *ours.shape[-3:])
    gap = transform.denormalize(ours.reshape(side)) - transform.denormalize(stock.reshape(side))
    worst = gap.abs().max().item()
    if not worst <= TOLERANCE:
        raise ValueError(
            f"{name} and this evaluator turn the same picture into pixels that differ by up to {worst:.3f} of the "
            "pixel range: its resize, crop, padding or normalisation is not followed here. Write a VLMInputs and pass "
            "it in place of the processor."
        )
