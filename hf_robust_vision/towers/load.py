"""The doors to every kind of tower: a model in memory, a folder or Hub id, an adapter, to an encoder of images in [0, 1]."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hf_robust_vision.pixels import PixelTransform

from .adapters import CONFIG_FILE, holds_adapter, merge_into, original_of, refuse_adapter
from .clip import CLIPEncoder, CLIPVisionEncoder, load_clip_encoder, view_clip
from .vlm import VLMEncoder, is_vlm, load_vlm, view_vlm
from .weights import local_or_hub


Encoder = Any  # a CLIPEncoder, CLIPVisionEncoder or VLMEncoder


def as_encoder(model: PreTrainedModel, processor: Any = None, *, resolution: int | None = None) -> Encoder:
    """View a stock model as an encoder of images in [0, 1] that shares its weights; an encoder is returned as it is.

    Args:
        model: A `CLIPModel`, a `CLIPVisionModelWithProjection`, or a vision-language model.
        processor: Its processor, its image processor, or for a CLIP a `PixelTransform`; a CLIP has OpenAI's means at
            the tower's resolution by default, a VLM needs one.
        resolution: Side in pixels of the square images that a VLM of free image size is given.

    Returns:
        What gives `image_embeds` and `patch_tokens` (CLIP), or `language_tokens` (VLM), see `EncoderOutput`.

    Raises:
        TypeError: If the model is of another class, or the processor is none.
        ValueError: If model and processor do not belong together, or the model can not be attacked as it is.
    """
    if isinstance(model, VLMEncoder):
        return model
    if isinstance(model, CLIPEncoder | CLIPVisionEncoder):
        if processor is not None:
            model.transform = _transform(processor)
        return model
    if isinstance(model, CLIPEncoder.stock_class | CLIPVisionEncoder.stock_class):
        return view_clip(model, None if processor is None else _transform(processor))
    if not is_vlm(model):
        raise TypeError(
            f"wanted a CLIPModel, a CLIPVisionModelWithProjection or a vision-language model that has "
            f"get_image_features(), got {type(model).__name__}."
        )
    if processor is None:
        raise TypeError(f"a {type(model).__name__} needs its processor: as_encoder(model, processor).")
    return view_vlm(model, processor, resolution)


def load_encoder(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    resolution: int | None = None,
    **kwargs: Any,
) -> Encoder:
    """Load a folder or Hub id as an encoder, and refuse anything that would be partly random.

    Of a vision-language model only tower and projector are read; the language model is not loaded.

    Args:
        name_or_path: Of a `CLIPModel`, a `CLIPVisionModelWithProjection`, or a vision-language model.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights; float32 are the master weights that fine-tuning needs, "auto" is as they were saved.
        resolution: See `as_encoder`.
        kwargs: Passed on to `from_pretrained`.

    Raises:
        ValueError: If it is an adapter, another type of model, or not the whole of one; see `load_pretrained`.
    """
    name = local_or_hub(name_or_path)
    refuse_adapter(name)
    config = AutoConfig.from_pretrained(name, revision=revision)
    load: Any = load_clip_encoder
    if getattr(config, "vision_config", None) is not None and config.model_type != "clip":
        load = load_vlm
        kwargs["resolution"] = resolution
    return load(name, revision=revision, dtype=dtype, **kwargs)


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
    return merge_into(encoder, source, part=encoder.trained_parts())


def image_embedder(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    """Images in [0, 1] to pooled embeddings at the dtype of the weights.

    It goes around `forward`, which a launcher may have wrapped in autocast: an evaluation runs at the precision it reports.
    """
    return lambda images: encoder.encode_images(images).image_embeds


def _transform(processor: Any) -> PixelTransform:
    if isinstance(processor, PixelTransform):
        return processor
    return PixelTransform.from_image_processor(getattr(processor, "image_processor", processor))
