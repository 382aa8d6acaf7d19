"""transformers' CLIP classes as encoders: images and text to features.

A `CLIPEncoder` is a `CLIPModel` whose `forward` takes images in [0, 1] and returns what every training loss needs.
Its state dict and its saved folder are those of a stock `CLIPModel`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from hf_robust_vision.pixels import PixelTransform

from .adapters import has_adapter, refuse_adapter, save_adapter
from .base import EncoderOutput, attack_mode
from .processors import load_image_processor
from .weights import load_pretrained, local_or_hub


STOCK = (CLIPModel, CLIPVisionModelWithProjection, CLIPVisionModel)
_REST = ("text_model.", "text_projection.", "logit_scale", "visual_projection.")  # may lie beside a vision tower


class _EncoderMixin:
    """What `CLIPEncoder` and `CLIPVisionEncoder` share."""

    transform: PixelTransform
    reader: Any = None  # of language tokens, see `read_by`
    vision_model: Any
    visual_projection: Any

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
            tokens = output.hidden_states[token_layer][:, 1:]
        return EncoderOutput(image_embeds=self.visual_projection(output.pooler_output), patch_tokens=tokens)

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
    def tower(self) -> nn.Module:
        """The vision tower."""
        return self.vision_model

    def trained_parts(self) -> list[nn.Module]:
        """What a loss on image features may train."""
        return [self.vision_model, self.visual_projection]

    def text_parts(self, text: str) -> list[nn.Module]:
        """What trains of the text tower: "encoder" (all of it), "projection" or "none"."""
        names = {"none": (), "projection": ("text_projection",), "encoder": ("text_model", "text_projection")}[text]
        return [getattr(self, name) for name in names]

    def probe(self) -> Tensor:
        """A grey image of the tower's size, shape (1, 3, height, width)."""
        side = _vision_config(self).image_size
        return torch.full((1, 3, side, side), 0.5, device=self.visual_projection.weight.device)

    def save_checkpoint(self, folder: str | Path, state_dict: Any = None) -> None:
        """Write what a run goes on from: here the stock folder, or the adapter alone."""
        self.save_pretrained(folder, state_dict=state_dict)

    def get_input_embeddings(self) -> nn.Module:
        """The module that takes the images; accelerate's FSDP2 asks for it, and a stock `CLIPModel` raises."""
        return self.vision_model.embeddings

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Save as the stock class, so that any reader of the config finds a class it knows; an adapter alone."""
        main = kwargs.get("is_main_process", True)
        if has_adapter(self):  # type: ignore[arg-type]
            if main:
                save_adapter(self, save_directory)
            return
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        self.config.architectures = [self.stock_class.__name__]  # type: ignore[attr-defined]
        if main:
            self.config.save_pretrained(save_directory)  # type: ignore[attr-defined]


class CLIPEncoder(_EncoderMixin, CLIPModel):
    """A `CLIPModel` whose forward pass takes images in [0, 1] and, if asked, tokenized prompts."""

    stock_class = CLIPModel

    def forward(
        self,
        images: Tensor | None = None,
        prompts: Mapping[str, Tensor] | None = None,
        token_layer: int | None = None,
        language_tokens: bool = False,
    ) -> EncoderOutput:
        """Encode images (see `see`), prompts (their `input_ids` and `attention_mask`), or both."""
        output = self.see(images, token_layer, language_tokens) if images is not None else EncoderOutput()
        if prompts is not None:
            output["text_embeds"] = self.encode_prompts(prompts)
        return output

    def encode_prompts(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """Projected text embeddings, not normalised, shape (prompts, dim)."""
        return text_embeddings(self, prompts)


class CLIPVisionEncoder(_EncoderMixin, CLIPVisionModelWithProjection):
    """A `CLIPVisionModelWithProjection` whose forward pass takes images in [0, 1]."""

    stock_class = CLIPVisionModelWithProjection

    def forward(self, images: Tensor, token_layer: int | None = None, language_tokens: bool = False) -> EncoderOutput:
        """Encode images in [0, 1], see `see`."""
        return self.see(images, token_layer, language_tokens)


CLIPs = CLIPEncoder | CLIPVisionEncoder


def view_clip(model: PreTrainedModel, transform: PixelTransform | None = None) -> CLIPs:
    """See `as_encoder`."""
    kind = next(kind for kind in (CLIPEncoder, CLIPVisionEncoder) if isinstance(model, kind.stock_class))
    with torch.device("meta"):
        encoder = kind(model.config)
    for name, child in model.named_children():
        setattr(encoder, name, child)
    for name, parameter in model.named_parameters(recurse=False):
        setattr(encoder, name, parameter)
    size = _vision_config(model).image_size
    encoder.transform = transform or PixelTransform(resize=size, crop=(size, size))
    return encoder.train(model.training)


def load_clip_encoder(name: str, *, revision: str | None = None, **kwargs: Any) -> CLIPs:
    """See `load_encoder`."""
    model = load_clip(name, (CLIPEncoder, CLIPVisionEncoder), revision=revision, **kwargs)
    size = _vision_config(model).image_size
    model.transform = PixelTransform.from_image_processor(load_image_processor(name, revision=revision))
    if model.transform.crop not in (None, (size, size)):
        raise ValueError(f"{name}: the image processor crops to {model.transform.crop}, the tower takes {size} px.")
    if model.dtype == torch.float16:  # finite weights may still overflow on their way through the layers
        with torch.no_grad(), attack_mode(model):
            embeds = model.encode_images(torch.full((1, 3, size, size), 0.5)).image_embeds
        if not bool(torch.isfinite(embeds).all()):
            raise ValueError(f"{name} overflows in torch.float16: load it in bfloat16 or float32.")
    return model


def load_clip(name: str | Path, kinds: Sequence[type] = STOCK, *, revision: str | None = None, **kwargs: Any) -> Any:
    """Load a CLIP model or its vision half as one of some classes of `STOCK`, or derived from them.

    Raises:
        ValueError: If it is an adapter, another model, or not the whole of one; see `load_pretrained`.
    """
    place = local_or_hub(name)
    refuse_adapter(place)
    config = AutoConfig.from_pretrained(place, revision=revision)
    projected = "CLIPVisionModelWithProjection" in (getattr(config, "architectures", None) or ())
    stock = {"clip": CLIPModel, "clip_vision_model": STOCK[1] if projected else STOCK[2]}.get(config.model_type)
    kind = next((kind for kind in kinds if stock is not None and issubclass(kind, stock)), None)
    if kind is None:
        wanted = " or ".join(getattr(kind, "stock_class", kind).__name__ for kind in kinds)
        raise ValueError(
            f"{name} holds a {config.model_type!r} model (architectures {config.architectures}); wanted a {wanted}. A "
            "bare CLIPVisionModel has no projection to align with text: save the CLIPModel that it came from."
        )
    return load_pretrained(kind, place, revision=revision, unread=_REST if stock is CLIPVisionModel else (), **kwargs)


def vision_half(encoder: CLIPs) -> CLIPVisionModelWithProjection:
    """The tower of an encoder and its projection as a stock model that shares their weights."""
    config = copy.deepcopy(_vision_config(encoder))
    config.projection_dim = encoder.visual_projection.out_features  # a CLIPModel keeps its own beside the tower's
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(config)
    tower.vision_model, tower.visual_projection = encoder.vision_model, encoder.visual_projection
    return tower.eval()


def _vision_config(model: PreTrainedModel) -> Any:
    return getattr(model.config, "vision_config", model.config)


def text_embeddings(model: CLIPModel, prompts: Mapping[str, Tensor]) -> Tensor:
    """Projected text embeddings of tokenized prompts, not normalised, shape (prompts, dim)."""
    return model.text_projection(model.text_model(**prompts).pooler_output)
