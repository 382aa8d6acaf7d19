"""The one room that knows transformers' CLIP classes: load, encode images and text, attack without a trace.

A `CLIPEncoder` is a `CLIPModel` whose `forward` takes images in [0, 1] and returns what every training loss needs.
Its state dict and its saved folder are those of a stock `CLIPModel`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)

from hf_robust_vision.pixels import PixelTransform

from .adapters import CONFIG_FILE, has_adapter, holds_adapter, merge_into, original_of, refuse_adapter, save_adapter
from .base import EncoderOutput, attack_mode
from .weights import load_pretrained, local_or_hub


STOCK = (CLIPModel, CLIPVisionModelWithProjection, CLIPVisionModel)
FEATURES = ("pooled", "patch_tokens", "both")
DEFAULT_TOKEN_LAYER = -2  # the layer that LLaVA reads

_REST = ("text_model.", "text_projection.", "logit_scale", "visual_projection.")  # may lie beside a vision tower


class _EncoderMixin:
    """What `CLIPEncoder` and `CLIPVisionEncoder` share."""

    transform: PixelTransform
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
        tokens: Any = None if token_layer is None else output.hidden_states[token_layer][:, 1:]
        return EncoderOutput(image_embeds=self.visual_projection(output.pooler_output), patch_tokens=tokens)

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
    ) -> EncoderOutput:
        """Encode images (see `encode_images`), prompts (their `input_ids` and `attention_mask`), or both."""
        output = self.encode_images(images, token_layer) if images is not None else EncoderOutput()
        if prompts is not None:
            output["text_embeds"] = self.encode_prompts(prompts)
        return output

    def encode_prompts(self, prompts: Mapping[str, Tensor]) -> Tensor:
        """Projected text embeddings, not normalised, shape (prompts, dim)."""
        return text_embeddings(self, prompts)


class CLIPVisionEncoder(_EncoderMixin, CLIPVisionModelWithProjection):
    """A `CLIPVisionModelWithProjection` whose forward pass takes images in [0, 1]."""

    stock_class = CLIPVisionModelWithProjection

    def forward(self, images: Tensor, token_layer: int | None = None) -> EncoderOutput:
        """Encode images in [0, 1]; see `CLIPEncoder.forward`."""
        return self.encode_images(images, token_layer)


Encoder = CLIPEncoder | CLIPVisionEncoder


def as_encoder(model: PreTrainedModel, transform: PixelTransform | None = None) -> Encoder:
    """View a stock CLIP model as an encoder that shares its weights; an encoder is returned as it is.

    Args:
        model: A `CLIPModel` or `CLIPVisionModelWithProjection`; another class is a TypeError.
        transform: Pixel settings of its image processor; by default OpenAI's means at the tower's resolution.
    """
    if isinstance(model, CLIPEncoder | CLIPVisionEncoder):
        if transform is not None:
            model.transform = transform
        return model
    for kind in (CLIPEncoder, CLIPVisionEncoder):
        if isinstance(model, kind.stock_class):
            break
    else:
        raise TypeError(f"wanted a CLIPModel or CLIPVisionModelWithProjection, got {type(model).__name__}.")
    with torch.device("meta"):
        encoder = kind(model.config)
    for name, child in model.named_children():
        setattr(encoder, name, child)
    for name, parameter in model.named_parameters(recurse=False):
        setattr(encoder, name, parameter)
    size = _vision_config(model).image_size
    encoder.transform = transform or PixelTransform(resize=size, crop=(size, size))
    return encoder.train(model.training)


def load_encoder(
    name_or_path: str | Path, *, revision: str | None = None, dtype: torch.dtype | str = torch.float32, **kwargs: Any
) -> Encoder:
    """Load a CLIP folder or Hub id as an encoder, and refuse anything that would be partly random.

    Args:
        name_or_path: Folder or Hub id of a `CLIPModel` or a `CLIPVisionModelWithProjection`.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights; float32 are the master weights that fine-tuning needs, "auto" is as they were saved.
        kwargs: Passed on to `from_pretrained`.

    Raises:
        ValueError: If it is an adapter, another type of model, or not the whole of one; see `load_pretrained`.
    """
    name = local_or_hub(name_or_path)
    model = load_clip(name, (CLIPEncoder, CLIPVisionEncoder), revision=revision, dtype=dtype, **kwargs)
    size = _vision_config(model).image_size
    try:
        processor = AutoImageProcessor.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} has no image processor (preprocessor_config.json), so its pixel mean and std are unknown: {error}"
        ) from error
    model.transform = PixelTransform.from_image_processor(processor)
    if model.transform.crop not in (None, (size, size)):
        raise ValueError(f"{name}: the image processor crops to {model.transform.crop}, the tower takes {size} px.")
    if model.dtype == torch.float16:  # finite weights may still overflow on their way through the layers
        with torch.no_grad(), attack_mode(model):
            embeds = model.encode_images(torch.full((1, 3, size, size), 0.5)).image_embeds
        if not bool(torch.isfinite(embeds).all()):
            raise ValueError(f"{name} overflows in torch.float16: load it in bfloat16 or float32.")
    return model


def merge_adapter(source: str | Path, *, base: Any = None) -> Encoder:
    """Load an adapter and the model that it was trained on, and add the one into the other; to be saved as a stock model.

    Args:
        source: Folder or Hub id of an adapter.
        base: The model that it was trained on, or its folder or Hub id; by default the one that the adapter names.

    Raises:
        ValueError: If the adapter does not name its base, does not fit it, or leaves its vision tower as it was.
    """
    source = local_or_hub(source)
    if not holds_adapter(source):
        raise ValueError(f"{source} has no {CONFIG_FILE}, so it is no PEFT adapter.")
    if isinstance(base, nn.Module):
        encoder = as_encoder(copy.deepcopy(base))
    else:
        name, revision = (base, None) if base is not None else original_of(source)
        encoder = load_encoder(name, revision=revision)
    return merge_into(encoder, source, part=[encoder.vision_model, encoder.visual_projection])


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


def vision_half(encoder: Encoder) -> CLIPVisionModelWithProjection:
    """The tower of an encoder and its projection as a stock model that shares their weights."""
    config = copy.deepcopy(_vision_config(encoder))
    config.projection_dim = encoder.visual_projection.out_features  # a CLIPModel keeps its own beside the tower's
    with torch.device("meta"):
        tower = CLIPVisionModelWithProjection(config)
    tower.vision_model, tower.visual_projection = encoder.vision_model, encoder.visual_projection
    return tower.eval()


def load_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer of a CLIP folder or Hub id."""
    return AutoTokenizer.from_pretrained(local_or_hub(name_or_path), revision=revision)


def load_image_processor(name_or_path: str | Path, *, revision: str | None = None) -> Any:
    """The image processor of a CLIP folder or Hub id."""
    return AutoImageProcessor.from_pretrained(local_or_hub(name_or_path), revision=revision)


def _vision_config(model: PreTrainedModel) -> Any:
    return getattr(model.config, "vision_config", model.config)


def token_layer_of(feature: str, layer: int) -> int | None:
    """The layer to read for a `feature`, or None where only the pooled embedding is read."""
    if feature not in FEATURES:
        raise ValueError(f"unknown feature {feature!r}; choose one of {', '.join(map(repr, FEATURES))}.")
    return None if feature == "pooled" else layer


def freeze_unread(encoder: Encoder, *, feature: str = "pooled", token_layer: int = -2, text: str = "none") -> None:
    """Let gradients flow only to what a loss on `feature` reaches; `logit_scale` always stays.

    A parameter without a gradient would break DDP, and weight decay would still shrink it.

    Args:
        encoder: Changed in place.
        feature: "pooled", "patch_tokens" or "both".
        token_layer: Which entry of `hidden_states` the tokens are; for "patch_tokens" later layers are frozen.
        text: What of the text half trains as well: "encoder" (all of it), "projection" or "none".

    Raises:
        ValueError: If the tower has no such layer.
    """
    layers: Any = encoder.vision_model.encoder.layers
    if feature != "pooled" and not -len(layers) - 1 <= token_layer <= len(layers):
        raise ValueError(
            f"token_layer={token_layer} is not there: a tower of {len(layers)} layers has hidden states 0 to "
            f"{len(layers)}, or {-len(layers) - 1} to -1 from the end."
        )
    encoder.requires_grad_(False)
    encoder.vision_model.requires_grad_(True)
    encoder.visual_projection.requires_grad_(True)
    if feature == "patch_tokens":
        read = token_layer if token_layer >= 0 else len(layers) + 1 + token_layer
        layers[read:].requires_grad_(False)
        encoder.vision_model.post_layernorm.requires_grad_(False)
        encoder.visual_projection.requires_grad_(False)
        if read == 0:  # before any attention the class token has not met the patches
            encoder.vision_model.embeddings.class_embedding.requires_grad_(False)
    if text != "none":
        encoder.text_model.requires_grad_(text == "encoder")
        encoder.text_projection.requires_grad_(True)


def text_embeddings(model: CLIPModel, prompts: Mapping[str, Tensor]) -> Tensor:
    """Projected text embeddings of tokenized prompts, not normalised, shape (prompts, dim)."""
    return model.text_projection(model.text_model(**prompts).pooler_output)


def image_embedder(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """Images in [0, 1] to pooled embeddings at the dtype of the weights.

    It goes around `forward`, which a launcher may have wrapped in autocast: an evaluation runs at the precision it reports.
    """
    return lambda images: encoder.encode_images(images).image_embeds
