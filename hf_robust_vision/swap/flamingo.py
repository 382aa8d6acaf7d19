"""OpenFlamingo: a vision encoder of open_clip, encoded without gradient, and a language model that attends to it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.stock import compare, ramps
from hf_robust_vision.towers.vlm_inputs import Row, VLMInputs

from .towers import find_towers


_PARTS = ("vision_encoder", "lang_encoder", "_encode_vision_x", "generate")


class FlamingoInputs(VLMInputs):
    """OpenFlamingo's model and its tokenizer, to be passed in place of a processor. The package is not imported.

    One image a prompt; texts before it are part of the prompt. `tokenizer` is that of `create_model_and_transforms`, with
    "<image>" among its tokens; `image_processor`, which comes with it, is compared on a picture with `transform`, which is
    by default OpenAI's, at the size of the vision encoder.

    Raises:
        TypeError: If the model lacks one of Flamingo's parts.
        ValueError: If `transform` does not do what `image_processor` does, or there is no image token.
    """

    image_token = "<image>"
    transform: PixelTransform

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        image_processor: Callable[[Any], Tensor] | None = None,
        transform: PixelTransform | None = None,
    ):
        missing = [name for name in _PARTS if not hasattr(model, name)]
        if missing:
            raise TypeError(f"{type(model).__name__} is no OpenFlamingo model: it has no {', '.join(missing)}.")
        if len(tokenizer(self.image_token, add_special_tokens=False)["input_ids"]) != 1:
            raise ValueError(
                f"the tokenizer splits {self.image_token!r}; use the one of create_model_and_transforms, which adds it."
            )
        side = find_towers(model, ["vision_encoder"])[0].geometry.image_size
        super().__init__(model, tokenizer, transform or PixelTransform(resize=side, crop=(side, side)))
        if image_processor is not None:
            picture, images = ramps(side * 3 // 2 + 1, side * 2)
            ours, theirs = self.transform.normalize(self.fit(images))[0], image_processor(picture)
            compare({"pixel_values": ours}, {"pixel_values": theirs}, max(self.transform.std), "transform")

    def identity(self) -> dict[str, Any]:
        """See `VLMInputs.identity`; what the model has no config for is read from its modules."""
        model: Any = self.vlm
        (tower,) = find_towers(model, ["vision_encoder"])
        language: Any = model.lang_encoder
        parts = {name: getattr(language, name, None) for name in ("config", "generation_config")}
        plain = {name: part.to_dict() if part is not None else {} for name, part in parts.items()}
        switches = {k: v for k, v in vars(tower.module).items() if isinstance(v, bool | int | str) and k[0] != "_"}
        del switches["training"]
        stop = {"eoc_token_id": getattr(model, "eoc_token_id", None)}
        return super().identity() | {"tower": asdict(tower.geometry), "switches": switches, "language": plain} | stop

    def encode(self, prompts: Sequence[str], size: tuple[int, int]) -> list[Row]:
        """See `VLMInputs.encode`; an image takes one place."""
        for prompt in prompts:
            if prompt.count(self.image_token) != 1:
                raise ValueError(f"the prompt {prompt!r} must hold the image token {self.image_token!r} once.")
        return [dict(self.tokenizer(prompt)) for prompt in prompts]

    def logits(self, images: Tensor, text: Mapping[str, Tensor], keep: int) -> Tensor:
        """See `VLMInputs.logits`."""
        with gradient_through_encoder(self.vlm), _media_forgotten(self.vlm.lang_encoder):
            output = self.vlm(vision_x=self._vision(images), **_language(text))
        logits: Tensor = output.logits[:, -keep:]
        return logits

    def generate(self, images: Tensor, text: Mapping[str, Tensor], max_new_tokens: int) -> Tensor:
        """See `VLMInputs.generate`."""
        model: Any = self.vlm
        greedy = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
        with _optional_mask(model.lang_encoder), _media_forgotten(model.lang_encoder):
            output: Tensor = model.generate(vision_x=self._vision(images), **_language(text), **greedy)
        return output[:, text["input_ids"].shape[1] :]

    def _vision(self, images: Tensor) -> Tensor:
        """Shape (batch, images, frames, 3, height, width)."""
        return self.transform.normalize(images).to(self.dtype)[:, None, None]


def _language(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model takes beside images, under its own names."""
    return {"lang_x": text["input_ids"], "attention_mask": text["attention_mask"]}


@contextmanager
def gradient_through_encoder(model: nn.Module) -> Iterator[None]:
    """Let the vision encoder follow the gradient of its input even where it is called under `no_grad`."""
    # OpenFlamingo encodes images under `no_grad`: an attack through it would find no gradient at all, and the model would
    # look robust. Only for a while, because its own training relies on it.
    encoder: Any = model.get_submodule("vision_encoder")
    forward = encoder.forward

    @functools.wraps(forward)
    def follow(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(pixel_values.requires_grad):
            return forward(pixel_values, *args, **kwargs)

    with _replaced(encoder, follow):
        yield


@contextmanager
def _media_forgotten(language_model: Any) -> Iterator[None]:
    """OpenFlamingo clears what its layers were conditioned on at the end; after an error somebody else has to."""
    try:
        yield
    except BaseException:
        language_model.clear_conditioned_layers()
        language_model._use_cached_vision_x = False
        raise


@contextmanager
def _optional_mask(language_model: Any) -> Iterator[None]:
    """Some versions of transformers generate without passing on a mask of ones, which OpenFlamingo's forward demands."""
    forward = language_model.forward
    mask = inspect.signature(forward).parameters.get("attention_mask")
    if mask is None or mask.default is not inspect.Parameter.empty:
        yield
        return
    with _replaced(language_model, functools.partial(forward, attention_mask=None)):
        yield


@contextmanager
def _replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward method for a while; one that an instance had of its own comes back."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
