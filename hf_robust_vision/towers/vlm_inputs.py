"""How vision-language models take images in [0, 1] and prompts: the processor's work, with a gradient to the images.

What is done here is compared with the stock processor once, on a picture, before anything is measured with it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import select_best_resolution

from hf_robust_vision.pixels import PixelTransform

from .stock import compare, need_gradient, on_tensors, processed, ramps, refuse_unlike, warn_of_another


HEAD_SHARE = 1 / 8  # of a prompt's tokens that stand before the image, from which on a pass of their own saves time
TOKENS = "<image>", "[IMG]", "<|image_pad|>", "<start_of_image>", "<IMG_CONTEXT>"
Row = dict[str, list[int]]  # what the tokenizer's side makes of one prompt: token ids, mask, kinds of tokens


@dataclass(frozen=True)
class OwnSize:
    """How images are fitted where a processor takes any size: they stay as they are, up to what it would reduce them to.

    Args:
        longest: Most pixels of a side.
        most: Most pixels of an image.
        grid: Heights and widths of which it takes the best one, the image's shape kept, reducing or enlarging.
        settings: Of the processor, for the identity of a measurement.
    """

    longest: float = math.inf
    most: float = math.inf
    grid: tuple[tuple[int, int], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_image_processor(cls, processor: Any, told: Mapping[str, Any]) -> OwnSize:
        """Read the settings of a Hugging Face image processor.

        Args:
            processor: Of images.
            told: What the processor around it tells it.
        """
        settings = {**processor.to_dict(), **{name: value for name, value in told.items() if value is not None}}
        grid = tuple((height, width) for height, width in settings.get("image_grid_pinpoints") or ())
        size = dict(settings["size"])
        long = size.get("longest_edge") or math.inf
        if "height" in size:  # of each tile
            bounds = {"most": size["height"] * size["width"] * settings.get("max_patches", 1)}
        else:  # Qwen's edges are numbers of pixels of the whole image
            bounds = {"most" if hasattr(processor, "merge_size") else "longest": long}
        return cls(**bounds, grid=grid, settings=settings)

    def fit(self, images: Tensor) -> Tensor:
        """Images in [0, 1] of any size to the size at which they are attacked, the same tensor if they already fit."""
        height, width = images.shape[-2:]
        if self.grid:
            best = select_best_resolution((height, width), [list(size) for size in self.grid])
            scale = min(best[0] / height, best[1] / width)
            size = min(math.ceil(height * scale), best[0]), min(math.ceil(width * scale), best[1])
        else:
            scale = min(1, self.longest / max(height, width), math.sqrt(self.most / (height * width)))
            size = max(int(height * scale), 1), max(int(width * scale), 1)
        return PixelTransform(size, None).fit(images)

    def __str__(self) -> str:
        return (
            "best of image_grid_pinpoints, shape kept"
            if self.grid
            else "the image's own, as far as the model reads it"
        )


class VLMInputs:
    """Base of the adapters: a model, its tokenizer, and how it sees images.

    A subclass says how prompts become tokens and images become what the model reads.

    Args:
        vlm: The model.
        tokenizer: Its tokenizer.
        transform: How images are fitted; resize, crop and normalisation.
    """

    closing = ""  # what the processor itself puts behind every prompt
    kind_of_answer = 0  # of the answer's tokens, where the model tells kinds of tokens apart

    def __init__(self, vlm: nn.Module, tokenizer: Any, transform: PixelTransform | OwnSize):
        self.vlm, self.tokenizer, self.transform = vlm, tokenizer, transform
        weight = next(parameter for parameter in vlm.parameters() if parameter.is_floating_point())
        self.device, self.dtype = weight.device, weight.dtype

    @property
    def resolution(self) -> int | str:
        """The size of the images under attack, for a result."""
        if isinstance(self.transform, OwnSize):
            return str(self.transform)
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

    def written(self, prompt: str) -> str:
        """A prompt as the processor is given it, "{}" left in its place."""
        return prompt

    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> list[Row]:
        """Tokens of prompts as `written`, with the places that images of this height and width take."""
        raise NotImplementedError

    def answered(self, row: Row, answer: Sequence[int]) -> Row:
        """A prompt's tokens with those of an answer behind them."""
        own = {"input_ids": list(answer), "attention_mask": [1] * len(answer)}
        return {name: values + own.get(name, [self.kind_of_answer] * len(answer)) for name, values in row.items()}

    def padded(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What `encode` gives, padded on the left, shape (rows, longest) each."""
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        length = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": pad}
        columns = {
            name: [[fill.get(name, 0)] * (length - len(row[name])) + row[name] for row in rows] for name in rows[0]
        }
        return {name: torch.tensor(values, device=self.device) for name, values in columns.items()}

    def logits(self, images: Tensor, text: Mapping[str, Tensor], keep: int) -> Tensor:
        """Logits of the last `keep` places, shape (batch, keep, vocabulary), differentiable in the images.

        Args:
            images: Shape (batch, 3, height, width).
            text: As `padded`.
            keep: Places at the end.
        """
        raise NotImplementedError

    def generate(self, images: Tensor, text: Mapping[str, Tensor], max_new_tokens: int) -> Tensor:
        """Token ids that the model adds by greedy decoding, shape (batch, new)."""
        raise NotImplementedError


class StockInputs(VLMInputs):
    """A stock model and its stock processor.

    Where the processor makes one image of fixed size of any picture, the image under attack has that size. Where it cuts
    tiles or takes any size, the attack is in the image's own pixels, and resize, tiles and padding are inside the attack.

    A prompt that holds the image token is used as it is. Any other becomes the user's message in the processor's chat
    template, behind the image, and the template opens the model's answer.

    Args:
        vlm: A stock model.
        processor: Its processor.

    Raises:
        TypeError: If the processor is none of images and text.
        ValueError: If the model has no `get_image_features`, is quantised, offloaded or spread over devices, or gives no
            gradient to the pixels; or if the processor is another model's, or does with tensors what it does not with
            pictures. The message has its name and what differs.
    """

    def __init__(self, vlm: nn.Module, processor: Any):
        refuse_unlike(vlm)
        for part in ("image_processor", "tokenizer", "image_token"):
            if not hasattr(processor, part):
                raise TypeError(
                    f"wanted the processor of a vision-language model or a VLMInputs, got {type(processor).__name__} "
                    f"without {part}: load it with AutoProcessor.from_pretrained."
                )
        warn_of_another(processor.image_processor, vlm.config, type(vlm).__name__)
        self.processor, self.image_token, self.name = processor, processor.image_token, type(processor).__name__
        super().__init__(vlm, processor.tokenizer, OwnSize())
        unknown = getattr(self.tokenizer, "unk_token_id", None)
        if unknown is not None and self.tokenizer.convert_tokens_to_ids(self.image_token) == unknown:
            raise ValueError(
                f"the tokenizer does not know the image token {self.image_token!r}: it belongs to another model."
            )
        template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        self.template = template.get("default") if isinstance(template, dict) else template
        unwrapped: Any = getattr(vlm, "get_base_model", lambda: vlm)()  # PEFT's forward takes **kwargs
        self.takes = frozenset(inspect.signature(unwrapped.forward).parameters)
        self.placeholder = getattr(vlm.config, "image_token_id", None)
        self.encoded = lru_cache(4096)(self._encoded)  # attacks ask again at every step
        self._begun: tuple[Mapping[str, Tensor], dict[str, Any]] | None = None
        self._check()

    def written(self, prompt: str) -> str:
        """See `VLMInputs.written`.

        Raises:
            ValueError: If the image token is not in it once, and no template puts it there; or if it holds another
                model's.
        """
        if self.image_token not in prompt and (other := next((token for token in TOKENS if token in prompt), None)):
            raise ValueError(
                f"the prompt {prompt!r} holds {other!r}, the image token of another model; this one's is "
                f"{self.image_token!r}. Without any, the processor's chat template is used, if it has one."
            )
        if self.image_token not in prompt and self.template is not None:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], chat_template=self.template, add_generation_prompt=True
            )
        self._need_token(prompt)
        return prompt

    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> list[Row]:
        """See `VLMInputs.encode`; a prompt has one image token, or is refused."""
        return [self.encoded(prompt, tuple(size)) for prompt in prompts]

    def _need_token(self, prompt: str) -> None:
        if prompt.count(self.image_token) != 1:
            raise ValueError(f"the prompt {prompt!r} must hold the image token {self.image_token!r} once.")

    def _encoded(self, prompt: str, size: tuple[int, int]) -> Row:
        self._need_token(prompt)
        made, of_images, _ = self.stock(Image.new("RGB", size[::-1]), prompt)
        # PaliGemma's labels are for training.
        names = [name for name in made if name not in of_images and name in self.takes and name != "labels"]
        return {name: made[name][0].tolist() for name in names}

    def pixels(self, images: Tensor) -> dict[str, Tensor]:
        """What the model reads of images in [0, 1] that have one size: pixel values, grids and masks."""
        if isinstance(self.transform, PixelTransform):
            made = {"pixel_values": self.transform.normalize(images)}
        else:
            made = processed(self.processor.image_processor, images, **self.settings)
        kept = {name: value for name, value in made.items() if name in self.takes}
        return {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in kept.items()}

    def logits(self, images: Tensor, text: Mapping[str, Tensor], keep: int) -> Tensor:
        """See `VLMInputs.logits`."""
        # A long prompt times a large vocabulary is gigabytes.
        few = {"logits_to_keep": keep} if "logits_to_keep" in self.takes else {}
        logits: Tensor = self.vlm(**self.begun(text), **self.pixels(images), **few).logits[:, -keep:]
        return logits

    def begun(self, text: Mapping[str, Tensor]) -> dict[str, Any]:
        """The text behind what all prompts say before the image, and the model's state there, computed for one of them.

        Only where the order of tokens alone decides what a token reads: kinds of tokens place Qwen's, and mask Gemma 3's
        and PaliGemma's. And only where there is much before the image, as this is one more pass: for the steps of an
        attack, which all ask with the same text, it is made once.
        """
        if self._begun is None or self._begun[0] is not text:
            self._begun = text, self._begin(text)
        # A forward pass writes what it reads into the state, and the next one begins where this one did.
        return {
            name: value if isinstance(value, Tensor) else copy.deepcopy(value)
            for name, value in self._begun[1].items()
        }

    def _begin(self, text: Mapping[str, Tensor]) -> dict[str, Any]:
        ids, mask = text["input_ids"], text["attention_mask"]
        places, pads = torch.arange(ids.shape[1], device=ids.device), (mask == 0).sum(1, keepdim=True)
        moved = ids.gather(1, (places + pads).clamp(max=len(places) - 1))
        same = (moved == moved[:1]).all(0) & (moved[0] != self.placeholder)
        head = int(same.long().cumprod(0).sum())
        if self.placeholder is None or len(text) > 2 or head < HEAD_SHARE * len(places):
            return dict(text)
        behind = torch.where(places < pads, places, places + head)[:, : len(places) - head]
        ids, mask = ids.gather(1, behind), mask.gather(1, behind)
        name = "cache" if "cache" in self.takes else "past_key_values"  # its older name
        with torch.no_grad():
            state = getattr(self.vlm(input_ids=moved[:1, :head], use_cache=True), name)
        state.batch_repeat_interleave(len(ids))
        whole, order = torch.cat([mask.new_ones(len(ids), head), mask], 1), (mask.cumsum(1) - 1).clamp(0) + head
        return {"input_ids": ids, "attention_mask": whole, "position_ids": order, name: state}

    def generate(self, images: Tensor, text: Mapping[str, Tensor], max_new_tokens: int) -> Tensor:
        """See `VLMInputs.generate`."""
        vlm: Any = self.vlm
        greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        output: Tensor = vlm.generate(**text, **self.pixels(images), **greedy)
        return output[:, text["input_ids"].shape[1] :]

    def stock(self, image: Image.Image, prompt: str) -> tuple[dict[str, Tensor], set[str], dict[str, Any]]:
        """What the stock processor makes of an image and a prompt, which of it is of the image, and by what settings.

        A processor may tell its image processor other ones than the latter's own: tiles, patches.
        """
        listening = copy.copy(self.processor)
        listening.image_processor = heard = Listening(self.processor.image_processor)
        # As transformers does, lest a prompt begin twice.
        opened = bool(self.tokenizer.bos_token) and prompt.startswith(self.tokenizer.bos_token)
        special = {"add_special_tokens": False} if opened else {}
        made = dict(listening(images=image, text=prompt, return_tensors="pt", **special))
        length = made["input_ids"].shape
        return made, {name for name in made if name in heard.names or made[name].shape != length}, heard.settings

    def _check(self) -> None:
        """Find out how the processor treats images, and refuse it where that can not be followed."""
        transform = self._fixed_size()
        if transform is not None:
            self.transform = transform
            images = self.fit(ramps(*_oblong(transform))[1])
        else:
            images = self._own_size()
        (row,) = self.encode([f"{self.image_token} a"], (images.shape[-2], images.shape[-1]))
        last = self.tokenizer.decode(row["input_ids"][-1:])
        self.closing = last if last.isspace() else ""
        if "suffix" in inspect.signature(type(self.processor).__call__).parameters:
            self.kind_of_answer = 1  # PaliGemma reads a prompt both ways, and what follows it one way
        text, names = self.padded([row]), (type(self.vlm).__name__, self.name)
        need_gradient(self.vlm, lambda pixels: self.logits(pixels, text, 1), images.to(self.device), names)

    def _fixed_size(self) -> PixelTransform | None:
        """Resize, crop and normalisation, if nothing else is done to any picture."""
        try:
            transform = PixelTransform.from_image_processor(self.processor.image_processor)
            picture, images = ramps(*_oblong(transform))
            made, of_images, _ = self.stock(picture, self.image_token)
            (only,) = of_images  # tiles come with sizes, grids or masks
            ours = transform.normalize(transform.fit(images))
            compare({only: ours}, made, max(transform.std), self.name)
        except ValueError:
            return None
        return transform

    def _own_size(self) -> Tensor:
        """Let the image processor work on tensors, once compared; an image for it, shape (1, 3, height, width)."""
        images_of = self.processor.image_processor
        picture, images = ramps(57, 43)
        made, of_images, self.settings = self.stock(picture, self.image_token)
        model = type(self.vlm).__name__
        if not of_images or (strange := sorted(of_images - self.takes)):
            raise ValueError(
                f"{self.name} gives {strange if of_images else 'nothing of an image'}, which {model} does not take: it "
                "belongs to another model."
            )
        self.transform = OwnSize.from_image_processor(images_of, self.settings)
        own = getattr(getattr(self.vlm, "config", None), "image_grid_pinpoints", None)
        if own is not None and [tuple(pair) for pair in own] != list(self.transform.grid):
            raise ValueError(
                f"image_grid_pinpoints of the model are {own}, of its processor {list(self.transform.grid)}: make them "
                "equal."
            )
        with on_tensors(images_of):
            ours = self.pixels(images)
        compare(ours, made, max(getattr(images_of, "image_std", None) or (1,)), self.name)
        return images


class Listening:
    """An image processor that remembers what it was told and what it gave."""

    def __init__(self, image_processor: Any):
        self.image_processor = image_processor

    def __getattr__(self, name: str) -> Any:
        return getattr(self.image_processor, name)

    def __call__(self, images: Any, **settings: Any) -> Any:
        """Process, and remember."""
        made = self.image_processor(images, **settings)
        self.settings, self.names = settings, set(made.keys())
        return made


def vlm_inputs(vlm: nn.Module, processor: Any) -> VLMInputs:
    """The adapter of a stock model and its processor; a `VLMInputs` of that model is returned as it is.

    Raises:
        TypeError: See `StockInputs`.
        ValueError: See `StockInputs`; or if the `VLMInputs` belongs to another model.
    """
    if not isinstance(processor, VLMInputs):
        return StockInputs(vlm, processor)
    if processor.vlm is not vlm:
        raise ValueError(f"the {type(processor).__name__} was made for another model: make one for this model.")
    return processor


def _oblong(transform: PixelTransform) -> tuple[int, int]:
    """Height and width of a picture that has to be resized and cropped."""
    fitted = transform.crop or transform.resize
    side = fitted if isinstance(fitted, int) else max(fitted)
    return side * 3 // 2 + 1, side * 2
