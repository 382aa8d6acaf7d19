"""The doors to every kind of tower: a model in memory, a folder or Hub id, an adapter, to an encoder of images in [0, 1]."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipModel,
    SiglipVisionModel,
)

from hf_robust_vision.pixels import PixelTransform

from .adapters import CONFIG_FILE, holds_adapter, merge_into, original_of, refuse_adapter
from .base import attack_mode
from .clip import CLIPEncoder, CLIPVisionEncoder
from .dual import PooledEncoder
from .processors import load_image_processor
from .siglip import SiglipEncoder, refuse_free_size
from .vlm import VLMEncoder, is_vlm, load_vlm, view_vlm
from .weights import load_pretrained, local_or_hub, reading


Encoder = Any  # a PooledEncoder or VLMEncoder

_POOLED: tuple[Any, ...] = (CLIPEncoder, CLIPVisionEncoder, SiglipEncoder)
STOCK: tuple[type[PreTrainedModel], ...] = (
    CLIPModel, CLIPVisionModelWithProjection, CLIPVisionModel, SiglipModel, SiglipVisionModel,
)  # fmt: skip
_WHOLE = {
    CLIPVisionModel: CLIPModel,
    SiglipVisionModel: SiglipModel,
}  # bare vision towers, and what each is cut out of
_REST = ("text_model.", "text_projection.", "logit_", "visual_projection.")  # may lie beside a bare vision tower


def as_encoder(model: PreTrainedModel, processor: Any = None, *, resolution: int | None = None) -> Encoder:
    """View a stock model as an encoder of images in [0, 1] that shares its weights; an encoder is returned as it is.

    Args:
        model: A `CLIPModel`, a `CLIPVisionModelWithProjection`, a `SiglipModel`, or a vision-language model.
        processor: Its processor, its image processor, or for a CLIP or SigLIP a `PixelTransform`; these have the means
            of the published ones at the tower's resolution by default, a VLM needs one.
        resolution: Side in pixels of the square images that a VLM of free image size is given.

    Returns:
        What gives `image_embeds` and `patch_tokens` (CLIP, SigLIP), or `language_tokens` (VLM), see `EncoderOutput`.

    Raises:
        TypeError: If the model is of another class, or the processor is none.
        ValueError: If model and processor do not belong together, or the model can not be attacked as it is.
    """
    if isinstance(model, VLMEncoder):
        return model
    if isinstance(model, PooledEncoder):
        if processor is not None:
            model.transform = _transform(processor)
        return model
    if any(isinstance(model, kind.stock_class) for kind in _POOLED):
        return _view(model, None if processor is None else _transform(processor))
    refuse_free_size(getattr(getattr(model, "config", None), "model_type", ""), f"the {type(model).__name__}")
    if not is_vlm(model):
        raise TypeError(
            f"wanted a CLIPModel, a CLIPVisionModelWithProjection, a SiglipModel or a vision-language model that has "
            f"get_image_features(), got {type(model).__name__}.{_way_back(type(model), _POOLED)}"
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
        name_or_path: Of what `as_encoder` takes.
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
    if getattr(config, "vision_config", None) is None or config.model_type in ("clip", "siglip", "siglip2"):
        return _load_pooled(name, revision=revision, dtype=dtype, **kwargs)
    return load_vlm(name, revision=revision, dtype=dtype, resolution=resolution, **kwargs)


def load_stock(name: str | Path, kinds: Sequence[Any] = STOCK, *, revision: str | None = None, **kwargs: Any) -> Any:
    """Load a CLIP, a SigLIP, or the vision half of one, as one of some classes of `STOCK`, or derived from them.

    Raises:
        ValueError: If it is an adapter, another model, or not the whole of one; see `load_pretrained`.
    """
    place = local_or_hub(name)
    refuse_adapter(place)
    config = AutoConfig.from_pretrained(place, revision=revision)
    refuse_free_size(config.model_type, str(name))
    like = [stock for stock in STOCK if cast(Any, stock.config_class).model_type == config.model_type]
    named = [stock for stock in like if stock.__name__ in (getattr(config, "architectures", None) or ())]
    stock = next(iter(named or like[::-1]), None)  # of CLIP's two vision halves the bare one, if none is named
    kind = next((kind for kind in kinds if stock is not None and issubclass(kind, stock)), None)
    if kind is None:
        wanted = " or ".join(getattr(kind, "stock_class", kind).__name__ for kind in kinds)
        raise ValueError(
            f"{name} holds a {config.model_type!r} model (architectures {config.architectures}); wanted a "
            f"{wanted}.{_way_back(stock, kinds)}"
        )
    unread = _REST if stock in _WHOLE else ()
    return load_pretrained(kind, place, revision=revision, unread=unread, **kwargs)


def load_named(
    name: str | Path, *, revision: str | None = None, dtype: torch.dtype | str = torch.float32
) -> PreTrainedModel:
    """Load a folder or Hub id whole, as the class of transformers that its config names.

    Raises:
        ValueError: If it is an adapter, transformers has no such class, or not the whole of one; see `load_pretrained`.
    """
    place = local_or_hub(name)
    refuse_adapter(place)
    with reading(name):
        config = AutoConfig.from_pretrained(place, revision=revision)
    named = (getattr(config, "architectures", None) or ("",))[0]
    kind = getattr(transformers, named, None)
    if kind is None:
        raise ValueError(
            f"{name} holds a {config.model_type!r} model ({named or 'no architecture named'}), for which transformers "
            "has no class."
        )
    model: PreTrainedModel = load_pretrained(kind, place, revision=revision, dtype=dtype)
    return model.eval()


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


def _way_back(stock: Any, kinds: Sequence[Any]) -> str:
    """For an error where one of `kinds` is wanted: what to do with a bare vision tower; nothing for another class."""
    whole = next((whole for bare, whole in _WHOLE.items() if stock is not None and issubclass(stock, bare)), None)
    if whole is None or not any(issubclass(kind, whole) for kind in kinds):
        return ""
    return (
        f" A bare {stock.__name__} lacks what ties it to text: load the {whole.__name__} that it came from, and if the "
        "tower was trained since, type model.vision_model.load_state_dict(tower.state_dict()) and save that model."
    )


def _view(model: PreTrainedModel, transform: PixelTransform | None) -> Any:
    kind = next(kind for kind in _POOLED if isinstance(model, kind.stock_class))
    with torch.device("meta"):
        encoder = kind(model.config)
    for name, child in model.named_children():
        setattr(encoder, name, child)
    for name, parameter in model.named_parameters(recurse=False):
        setattr(encoder, name, parameter)
    encoder.transform = transform or kind.default_transform(encoder.image_size)
    return encoder.train(model.training)


def _load_pooled(name: str, *, revision: str | None = None, **kwargs: Any) -> Any:
    encoder = load_stock(name, _POOLED, revision=revision, **kwargs)
    size = encoder.image_size
    encoder.transform = PixelTransform.from_image_processor(load_image_processor(name, revision=revision))
    made = encoder.transform.crop or encoder.transform.resize
    if made not in (size, (size, size)):
        raise ValueError(f"{name}: the image processor makes images of {made}, the tower takes {size} px.")
    if encoder.dtype == torch.float16:  # finite weights may still overflow on their way through the layers
        with torch.no_grad(), attack_mode(encoder):
            embeds = encoder.encode_images(encoder.probe()).image_embeds
        if not bool(torch.isfinite(embeds).all()):
            raise ValueError(f"{name} overflows in torch.float16: load it in bfloat16 or float32.")
    return encoder
