"""What encoders with a pooled image embedding share: CLIP's and SigLIP's towers, with or without a text tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from hf_robust_vision.pixels import PixelTransform

from .adapters import has_adapter, save_adapter
from .base import EncoderOutput


class PooledEncoder(nn.Module):
    """What a stock class gets to be an encoder: `forward` takes images in [0, 1], and its saved folder stays stock."""

    stock_class: ClassVar[type[PreTrainedModel]]
    class_tokens: ClassVar[int]  # hidden states that stand before those of the patches
    transform: PixelTransform
    reader: Any = None  # of language tokens, see `read_by`
    config: Any
    vision_model: Any

    @classmethod
    def default_transform(cls, size: int) -> PixelTransform:
        """How the published checkpoints prepare images for a tower of so many pixels a side."""
        raise NotImplementedError

    def project(self, pooled: Tensor) -> Tensor:
        """From what the vision tower pools to the space that text shares, shape (batch, dim)."""
        raise NotImplementedError

    def forward(self, images: Tensor, token_layer: int | None = None, language_tokens: bool = False) -> EncoderOutput:
        """Encode images in [0, 1], see `see`."""
        return self.see(images, token_layer, language_tokens)

    def encode_images(self, images: Tensor, token_layer: int | None = None) -> EncoderOutput:
        """Encode images in [0, 1] without touching text; normalisation happens here.

        Args:
            images: Shape (batch, 3, height, width), already of the tower's size.
            token_layer: Also give the patch tokens of this entry of `hidden_states` (-2: what LLaVA reads).
        """
        pixel_values = self.transform.normalize(images)
        output = self.vision_model(pixel_values, output_hidden_states=token_layer is not None)
        tokens: Any = None
        if token_layer is not None:
            layers = len(output.hidden_states) - 1
            if not -layers - 1 <= token_layer <= layers:
                raise ValueError(
                    f"token_layer={token_layer} is not there: a tower of {layers} layers has hidden states 0 to "
                    f"{layers}, or {-layers - 1} to -1 from the end."
                )
            tokens = output.hidden_states[token_layer][:, self.class_tokens :]
        return EncoderOutput(image_embeds=self.project(output.pooler_output), patch_tokens=tokens)

    def read_by(self, reader: Any) -> None:
        """Give `language_tokens` from now on: what a VLM's language model reads of this tower.

        Args:
            reader: A `towers.vlm.LanguageReader` of a VLM that the tower fits.
        """
        # Not one of the encoder's modules: its projector belongs to the VLM, and is neither trained nor saved.
        object.__setattr__(self, "reader", reader.of(self))

    def see(self, images: Tensor, token_layer: int | None = None, language_tokens: bool = False) -> EncoderOutput:
        """As `encode_images`; with `language_tokens` also what the language model of a VLM reads, see `read_by`.

        `image_embeds` is then the mean of these tokens.
        """
        output = EncoderOutput()
        if token_layer is not None or not language_tokens:
            output = self.encode_images(images, token_layer)
        if not language_tokens:
            return output
        if self.reader is None:
            raise ValueError(
                "feature language_tokens needs the VLM whose language model is to read them: type --vlm NAME, or call "
                "encoder.read_by(LanguageReader(NAME))."
            )
        return EncoderOutput(**output | self.reader(images))

    @property
    def image_size(self) -> int:
        """Side in pixels of the images that the tower takes."""
        return getattr(self.config, "vision_config", self.config).image_size

    @property
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.vision_model

    def trained_parts(self) -> list[nn.Module]:
        """What a loss on image features may train."""
        return [self.vision_model]

    def text_parts(self, text: str) -> list[nn.Module]:
        """What trains of the text tower: "encoder" (all of it), "projection" or "none"."""
        if text != "none":
            raise ValueError(f"a vision tower alone has no text tower, of which {text!r} could train.")
        return []

    def settings(self) -> dict[str, Any]:
        """What beside its weights decides what it learns, for records and a resume."""
        return {} if self.reader is None else {"vlm": self.reader.name}

    def probe(self) -> Tensor:
        """An image of the tower's size, different everywhere, shape (1, 3, height, width)."""
        # Not grey: SigLIP normalises that to zeros, at which the patch embedding has no gradient.
        side, device = self.image_size, next(self.tower.parameters()).device
        return torch.linspace(0, 1, 3 * side * side, device=device).view(1, 3, side, side)

    def save_checkpoint(self, folder: str | Path, state_dict: Any = None) -> None:
        """Write what a run goes on from: here the stock folder, or the adapter alone."""
        self.save_pretrained(folder, state_dict=state_dict)

    def get_input_embeddings(self) -> nn.Module:
        """The module that takes the images; accelerate's FSDP2 asks for it, and a stock `CLIPModel` raises."""
        return self.vision_model.embeddings

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save as the stock class, so that any reader of the config finds a class it knows; an adapter alone."""
        main = kwargs.get("is_main_process", True)
        if has_adapter(self):
            if main:
                save_adapter(self, save_directory)
            return
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        self.config.architectures = [self.stock_class.__name__]
        if main:
            self.config.save_pretrained(save_directory)


class DualEncoder(PooledEncoder):
    """A vision and a text tower with one space for both: what zero-shot classification and retrieval need."""

    text_model: Any
    logit_scale: Tensor
    text_inputs: ClassVar[tuple[str, ...]]  # what the text tower reads of a tokenizer's output
    text_head: ClassVar[str]  # path of the linear layer into the common space
    prompts_at_once: int = 0  # of a forward pass that keeps them for its backward pass; 0: all

    def forward(  # type: ignore[override]
        self,
        images: Tensor | None = None,
        prompts: Mapping[str, Tensor] | None = None,
        token_layer: int | None = None,
        language_tokens: bool = False,
    ) -> EncoderOutput:
        """Encode images (see `see`), prompts (as of `tokenize`), or both."""
        output = self.see(images, token_layer, language_tokens) if images is not None else EncoderOutput()
        if prompts is not None:
            output["text_embeds"] = self._encode_in_parts(prompts)
        return output

    def _encode_in_parts(self, prompts: Mapping[str, Tensor]) -> Tensor:
        count, size = len(next(iter(prompts.values()))), self.prompts_at_once
        if not 0 < size < count:
            return self.encode_prompts(prompts)
        # What a part keeps for its backward pass is computed anew there: memory is that of one part, not of all classes.
        # With gradients only, since there is nothing to keep otherwise.
        parts = [{key: value[at : at + size] for key, value in prompts.items()} for at in range(0, count, size)]
        if not torch.is_grad_enabled():
            return torch.cat([self.encode_prompts(part) for part in parts])
        return torch.cat([checkpoint(self.encode_prompts, part, use_reentrant=False) for part in parts])

    def padding(self) -> dict[str, Any]:
        """How a tokenizer is to pad the prompts of a batch."""
        return {"padding": True}

    def tokenize(self, tokenizer: Any, prompts: Sequence[str], device: Any = None) -> dict[str, Tensor]:
        """Prompts to what the text tower reads, padded as it was trained and cut at its limit, on its device or `device`."""
        tokens = tokenizer(list(prompts), truncation=True, return_tensors="pt", **self.padding())
        return {key: tokens[key].to(device or self.logit_scale.device) for key in self.text_inputs}

    def encode_prompts(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """Text embeddings in the space of the images', not normalised, shape (prompts, dim)."""
        raise NotImplementedError

    def text_parts(self, text: str) -> list[nn.Module]:
        """As `PooledEncoder.text_parts`."""
        names = {"none": (), "projection": (self.text_head,), "encoder": ("text_model", self.text_head)}[text]
        return [self.get_submodule(name) for name in names]
