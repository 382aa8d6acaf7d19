"""The tower inside a vision-language model, seen through the tokens that its language model reads.

transformers gives nearly every VLM one hook: `get_image_features` returns, as `pooler_output`, exactly what the language
model reads of an image. The stock image processors are torch code, and differentiable. So one encoder serves all of
them; what it holds is the VLM without its language model.
"""

from __future__ import annotations

import copy
import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hf_robust_vision.pixels import PixelTransform

from .adapters import has_adapter, save_adapter
from .base import EncoderOutput, weights_sha256
from .graft import Origin
from .processors import load_image_processor
from .stock import compare, need_gradient, need_hook, on_tensors, processed, ramps, refuse_unlike, warn_of_another
from .weights import check_weights, local_or_hub, weights_files


MOST_PIXELS = 448  # side of the square that a tower of any size is given by default


class Absent(nn.Module):
    """Stands where the language model was: it holds nothing and can not be run."""


class VLMEncoder:
    """What a VLM's class gets, by `seeing`, to be an encoder: images in [0, 1] to what its language model reads.

    The language model and its head are absent. `save_pretrained` writes the whole VLM all the same: the rest comes
    from `origin`, bit for bit.
    """

    stock_class: type[PreTrainedModel]
    transform: PixelTransform
    image_processor: Any
    origin: Origin
    train_projector: bool = False

    def forward(
        self: Any, images: Tensor, token_layer: int | None = None, language_tokens: bool = True
    ) -> EncoderOutput:
        """Encode images in [0, 1] of one size.

        Args:
            images: Shape (batch, 3, height, width).
            token_layer: A VLM's tower has no layer of its own to read: only None.
            language_tokens: Always given.

        Returns:
            `language_tokens`, shape (batch, tokens, width of the language model); `deepstack_tokens`, shape (batch,
            tokens, layers, width), where the language model reads several layers; `image_embeds`, the mean token.
        """
        if token_layer is not None:
            raise ValueError("a VLM's encoder gives language_tokens; for patch tokens load the tower alone.")
        read = self.get_image_features(**self.image_inputs(images), return_dict=True)
        tokens = _by_image(read.pooler_output, len(images))
        deep = getattr(read, "deepstack_features", None)
        layers: Any = None if not deep else torch.stack([_by_image(layer, len(images)) for layer in deep], dim=2)
        return EncoderOutput(image_embeds=tokens.mean(1), language_tokens=tokens, deepstack_tokens=layers)

    encode_images = forward

    def image_inputs(self: Any, images: Tensor) -> dict[str, Tensor]:
        """What the hook takes: pixel values, differentiable in the images, and the grids and masks of their size."""
        made = processed(self.image_processor, images)
        inputs = {name: value for name, value in made.items() if name in self.hook_arguments}
        return inputs | {"pixel_values": inputs["pixel_values"].to(self.dtype)}

    @property
    def hook_arguments(self: Any) -> frozenset[str]:
        """Names that `get_image_features` takes."""
        inner = getattr(self.base_model, "get_image_features", self.get_image_features)
        return frozenset(inspect.signature(inner).parameters)

    def get_input_embeddings(self: Any) -> nn.Module:
        """The module that takes the pixels; accelerate's FSDP2 asks for it, and the words' one is absent."""
        return next(module for module in self.tower.modules() if list(module.parameters(recurse=False)))

    @property
    def tower(self: Any) -> nn.Module:
        """The vision tower, as transformers finds it."""
        return self.get_encoder(modality="image")

    def trained_parts(self: Any) -> list[nn.Module]:
        """What a loss on the tokens may train: the tower and, if asked, all that lies between it and the tokens."""
        return [self if self.train_projector else self.tower]

    def text_parts(self, text: str) -> list[nn.Module]:
        """There is no text tower.

        Raises:
            ValueError: If one is to train.
        """
        if text != "none":
            raise ValueError(f"a VLM's encoder has no text tower, of which {text!r} could train.")
        return []

    def settings(self: Any) -> dict[str, Any]:
        """What beside its weights decides what it learns, for records and a resume."""
        return {"resolution": max(self.probe().shape[-2:]), "train_projector": self.train_projector}

    def probe(self: Any) -> Tensor:
        """An image of the size that is attacked, different everywhere, shape (1, 3, height, width)."""
        size = self.transform.crop or self.transform.resize
        height, width = size if isinstance(size, tuple) else (size, size)
        return ramps(height, width)[1].to(next(self.parameters()).device)

    def save_checkpoint(self: Any, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write what is here, tower and projector, under its names in the module: of a run, not a model to load."""
        if has_adapter(self):
            save_adapter(self, folder)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        state = {name: value.contiguous() for name, value in (state_dict or self.state_dict()).items()}
        save_file(state, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        self.config.save_pretrained(folder)

    def save_pretrained(
        self: Any, save_directory: str | Path, *, state_dict: Any = None, is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Write the whole VLM as the stock folder of its own class: this tower, and the rest of where it came from.

        Of one with an adapter the adapter alone.

        Raises:
            ValueError: If it is the folder of the original, or a weight is not finite in the precision of its file.
        """
        if has_adapter(self):
            if is_main_process:
                save_adapter(self, save_directory)
        elif is_main_process:
            self.origin.save_with(self, state_dict or self.state_dict(), Path(save_directory), **kwargs)


@cache
def seeing(kind: type[PreTrainedModel]) -> Any:
    """The class of a VLM without its language model, as an encoder; weights have the names that they have in the VLM.

    Raises:
        ValueError: If the class has no hook for image features, or does not tell where its language model is.
    """
    need_hook(kind, kind.__name__, "get_decoder", "get_output_embeddings")

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        for part in (self.get_output_embeddings(), self.get_decoder()):
            if part is not None:
                self.set_submodule(path_of(self, part), Absent())

    body = {
        "__init__": __init__,
        "__module__": kind.__module__,  # transformers finds the names of weights in files by class
        "stock_class": kind,
        "_keys_to_ignore_on_load_unexpected": [r"."],  # the language model's, which are not read
        "_tied_weights_keys": {},  # the head is not there to be tied
        "tie_weights": lambda self, *args, **kwargs: None,
    }
    return type(kind.__name__, (VLMEncoder, kind), body)


def path_of(model: nn.Module, part: nn.Module) -> str:
    """Dotted name of a module inside another."""
    return next(path for path, module in model.named_modules() if module is part)


def is_vlm(model: Any) -> bool:
    """Whether a model, or its class, has the hook."""
    return (
        hasattr(model, "get_image_features")
        and hasattr(model, "get_decoder")
        and not hasattr(model, "get_text_features")
    )


def vlm_class(folder: str | Path) -> str | None:
    """Name of the class of the VLM in a folder, by its config alone; None where that names no VLM."""
    path = Path(folder) / "config.json"
    try:
        named: str = json.loads(path.read_text(encoding="utf-8"))["architectures"][0]
    except (OSError, ValueError, LookupError, TypeError):  # what is wrong with it tells who loads the model
        return None
    return named if is_vlm(getattr(transformers, named, None)) else None


def view_vlm(vlm: Any, processor: Any, resolution: int | None = None) -> Any:
    """See `as_encoder`: a VLM in memory as an encoder that shares the weights of its tower and projector.

    Raises:
        ValueError: If the VLM is quantised, offloaded or spread over devices, or its processor is another model's.
    """
    refuse_unlike(vlm)
    with torch.device("meta"):
        encoder = seeing(cast(Any, type(vlm)))(vlm.config)
    for path, module in encoder.named_modules():
        if isinstance(module, Absent):
            continue
        theirs = vlm.get_submodule(path)
        for name, child in module.named_children():
            if not any(isinstance(part, Absent) for part in child.modules()):
                setattr(module, name, theirs.get_submodule(name))
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            setattr(module, name, getattr(theirs, name))
    encoder.origin = Origin(whole=vlm)
    return _finished(encoder.train(vlm.training), processor, resolution)


def load_vlm(
    name: str,
    config: Any = None,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    resolution: int | None = None,
    **kwargs: Any,
) -> Any:
    """See `load_encoder`: the tower and projector of a VLM's folder or Hub id; the language model is not read.

    Raises:
        ValueError: If it is no VLM of a supported kind, is quantised, or a weight of tower or projector is missing or
            offloaded.
    """
    config = config or AutoConfig.from_pretrained(name, revision=revision)
    named = (getattr(config, "architectures", None) or ("",))[0]
    kind = getattr(transformers, named, None)
    if kind is None or not is_vlm(kind):
        raise ValueError(
            f"{name} holds a {config.model_type!r} model ({named or 'no architecture named'}), which has no "
            "get_image_features() that tells what its language model reads of an image."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantised: harden the original in bfloat16 or float32, and quantise the result.")
    place = _downloaded(name, revision)
    origin = Origin(files=tuple(weights_files(place)), name=name, revision=revision)
    origin.check_files()
    encoder, info = seeing(kind).from_pretrained(
        place, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    refuse_unlike(encoder)  # a device_map may have spread it
    lacking = sorted(info["missing_keys"]) + sorted(str(key) for key in info.get("mismatched_keys", ()))
    if lacking:
        raise ValueError(
            f"{name} lacks {len(lacking)} weights of the tower of a {named} ({', '.join(lacking[:3])}), which would be "
            "left random. Export the whole model with save_pretrained."
        )
    check_weights(encoder.state_dict(), name)
    encoder.origin = origin
    origin.check_names(encoder)
    return _finished(encoder, load_image_processor(name, revision=revision), resolution)


class LanguageReader:
    """What a VLM makes of a tower that it will be given: the tower's images to what its language model reads.

    Args:
        name: Folder or Hub id of the VLM; its language model is not read.
        revision: Branch, tag or commit on the Hub.
        resolution: See `as_encoder`.
    """

    def __init__(self, name: str, *, revision: str | None = None, resolution: int | None = None):
        self.vlm = load_vlm(local_or_hub(name), revision=revision, resolution=resolution).eval().requires_grad_(False)
        self.name = f"{Path(name).name if Path(name).is_dir() else name} (weights {weights_sha256(self.vlm)[:12]})"

    def of(self, encoder: Any) -> LanguageReader:
        """A reader that looks through the vision tower of an encoder; this one stays as it is.

        Raises:
            ValueError: If the VLM's tower is of another class or shape.
        """
        own, theirs = encoder.tower, self.vlm.tower
        shapes = [{name: tuple(value.shape) for name, value in part.state_dict().items()} for part in (own, theirs)]
        # A VLM leaves SigLIP's pooling head out; that it is there is no hindrance.
        headless = {name: shape for name, shape in shapes[0].items() if not name.startswith("head.")}
        if type(own) is not type(theirs) or shapes[1] not in (shapes[0], headless):
            raise ValueError(
                f"the tower of {self.vlm.stock_class.__name__} is a {type(theirs).__name__} of "
                f"{sum(value.numel() for value in theirs.parameters()):,} weights, the one to train a "
                f"{type(own).__name__} of {sum(value.numel() for value in own.parameters()):,}: it could not be swapped in."
            )
        reader = copy.copy(self)
        reader.vlm = copy.deepcopy(self.vlm, {id(theirs): own})
        return reader

    def __call__(self, images: Tensor) -> EncoderOutput:
        """See `VLMEncoder.forward`."""
        if any(part.device != images.device for part in self.vlm.parameters()):
            self.vlm.to(images.device)
        return self.vlm(images)


def _downloaded(name: str, revision: str | None) -> str:
    """A folder with all that belongs to a model: its tokenizer and its card's files are saved again, too."""
    if Path(name).is_dir():
        return name
    from huggingface_hub import snapshot_download

    other = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.onnx", "*.msgpack", "*.h5", "original/*"]
    return snapshot_download(name, revision=revision, ignore_patterns=other)


def _finished(encoder: Any, processor: Any, resolution: int | None) -> Any:
    """Give an encoder its image processor, and refuse both where they do not belong together."""
    # What FSDP2 is to wrap; it refuses a name of the language model, which is absent.
    present = {type(module).__name__ for module in encoder.modules()}
    encoder._no_split_modules = sorted(present & set(encoder._no_split_modules or ()))
    encoder.image_processor = getattr(processor, "image_processor", processor)
    if not callable(encoder.image_processor) or not hasattr(encoder.image_processor, "image_mean"):
        raise TypeError(f"wanted the processor of a VLM or its image processor, got {type(processor).__name__}.")
    encoder.transform = square(encoder.image_processor, encoder.config, resolution)
    _compare_with_stock(encoder)
    return encoder


def square(processor: Any, config: Any, resolution: int | None = None) -> PixelTransform:
    """How images are fitted before they are attacked: to the tower's size where it has one, else to a square.

    Args:
        processor: Image processor.
        config: Of the VLM.
        resolution: Side in pixels; by default the processor's, or the tower's up to `MOST_PIXELS`.
    """
    size = dict(processor.size)
    crop = dict(getattr(processor, "crop_size", None) or {}) if getattr(processor, "do_center_crop", False) else {}
    fixed = crop.get("height") or size.get("height")
    vision = getattr(config, "vision_config", config)
    own = getattr(vision, "image_size", None) or MOST_PIXELS
    side = resolution or fixed or min(own[0] if isinstance(own, list | tuple) else own, MOST_PIXELS)
    mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    whole = "shortest_edge" not in size  # the processor would stretch an image to its square, and not crop it
    return PixelTransform((side, side) if whole and fixed and resolution is None else side, (side, side), mean, std)


def _by_image(tokens: Any, images: int) -> Tensor:
    """Tokens of one image after another, in whatever pieces a family gives them, as (images, tokens, width)."""
    whole = tokens if isinstance(tokens, Tensor) else torch.cat([part.reshape(-1, part.shape[-1]) for part in tokens])
    return whole.reshape(images, -1, whole.shape[-1])


def _compare_with_stock(encoder: Any) -> None:
    """Refuse a processor that makes something else of a picture than it makes of our tensor, or of another model.

    Raises:
        ValueError: If names, shapes, grids or pixels differ, the model can not read what it makes, or no gradient
            comes back from there.
    """
    processor, name = type(encoder.image_processor).__name__, encoder.stock_class.__name__
    warn_of_another(encoder.image_processor, encoder.config, name)
    side = encoder.probe().shape[-1]
    picture, images = ramps(side * 3 // 2 + 1, side * 2)
    stock = encoder.image_processor(images=[[picture]], return_tensors="pt")
    with on_tensors(encoder.image_processor), torch.no_grad():
        ours = encoder.image_inputs(images.to(encoder.device))
    compare(ours, stock, max(encoder.transform.std), processor)
    images = encoder.probe()
    tokens, gradient = need_gradient(
        encoder, lambda pixels: encoder(pixels).language_tokens, images, (name, processor)
    )
    width = encoder.config.get_text_config().hidden_size
    if tokens.shape[-1] != width:
        raise ValueError(
            f"get_image_features() of {name} gives vectors of {tokens.shape[-1]}, and its language model reads {width}: "
            "what it reads is not known."
        )
    if not bool(gradient.any()):
        raise ValueError(
            f"the gradient of what {name} reads is zero at every pixel: its projector or its tower holds weights that "
            "are all zero."
        )
