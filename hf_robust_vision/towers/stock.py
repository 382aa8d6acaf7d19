"""A VLM's stock processor as a function of images in [0, 1], and what is asked of a stock VLM before it is looked through.

transformers' image processors are torch code: given floats in [0, 1] in place of a picture they do what they always do,
and a gradient flows through. What they make of a tensor is compared with what they make of the same picture, once,
before anything is trained or measured.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from .base import attack_mode
from .weights import FLOATS


TOLERANCE = 3 / 255  # processors round resized pixels to 8 bits


def processed(image_processor: Any, images: Tensor, **settings: Any) -> dict[str, Tensor]:
    """What a stock image processor makes of images in [0, 1] of one size: pixel values, grids and masks.

    Args:
        image_processor: On torchvision; one on PIL gives no gradient.
        images: Shape (batch, 3, height, width).
        settings: What the processor around it tells it beside.
    """
    bounded = copy.copy(image_processor)
    # Where a resize overshoots black or white, 8 bits are cut off; so are our floats.
    bounded.resize = lambda *args, **kwargs: image_processor.resize(*args, **kwargs).clamp(0, 1)
    floats = {"do_rescale": False, "input_data_format": "channels_first", "return_tensors": "pt"}
    # An image a sample: some processors would take a plain list for one sample of many images. In float32, as a
    # stock processor runs before any autocast.
    with torch.autocast(images.device.type, enabled=False):
        made = bounded(images=[[image] for image in images], **(settings | floats))
    return {name: value.to(images.device) for name, value in made.items() if isinstance(value, Tensor)}


@contextmanager
def on_tensors(image_processor: Any) -> Iterator[None]:
    """Where it is given a tensor for the first time: one that works with PIL fails, in one way or another.

    Raises:
        ValueError: With what to do about it.
    """
    try:
        yield
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"{type(image_processor).__name__} does not work on tensors ({error}): install torchvision, and load it again, "
            "or write a VLMInputs and pass it in place of the processor."
        ) from error


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


def compare(ours: Mapping[str, Tensor], stock: Mapping[str, Tensor], std: float, name: str) -> None:
    """Refuse to go on where a tensor does not become what the same picture becomes.

    Args:
        ours: Of the tensor.
        stock: Of the picture.
        std: The largest that pixels were divided by.
        name: Of the processor.

    Raises:
        ValueError: If shapes, grids or masks differ, or pixels by more than rounding explains.
    """
    for key, value in ours.items():
        mine, theirs = value.detach().float().cpu(), stock[key].float().cpu()
        what = "pixels" if key == "pixel_values" else key
        if mine.shape != theirs.shape:
            raise ValueError(
                f"{name} gives {key} of shape {tuple(theirs.shape)} for a picture, here they are of {tuple(mine.shape)}: "
                f"its resize, crop or padding is not followed. {OTHERWISE}"
            )
        gap = (mine - theirs).abs().max().item() * (std if value.is_floating_point() else 1)
        if not gap <= (TOLERANCE if value.is_floating_point() else 0):
            raise ValueError(
                f"{name} and this evaluator turn the same picture into {what} that differ by up to {gap:.3f} of the "
                f"pixel range: its resize, crop, padding or normalisation is not followed here. {OTHERWISE}"
            )


OTHERWISE = "For another model write a VLMInputs and pass it in place of the processor."


def refuse_unlike(vlm: nn.Module) -> None:
    """Refuse a VLM that no gradient passes, or not whole on one device.

    Raises:
        ValueError: If it is offloaded, quantised, sharded, or spread over devices, or has no hook for image features.
    """
    name, tensors = type(vlm).__name__, list(vlm.parameters())
    need_hook(vlm, name)
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError(f"parts of the {name} are offloaded: load it without device_map, or name its folder instead.")
    if odd := _quantised(vlm, tensors):
        raise ValueError(f"the {name} is quantised ({odd}): load the original in bfloat16 or float32.")
    if any(hasattr(tensor, "device_mesh") for tensor in tensors):
        raise ValueError(f"the {name} is sharded over processes: load it whole, without tp_plan or device_mesh.")
    if len(devices := {str(tensor.device) for tensor in tensors}) > 1:
        raise ValueError(f"the {name} is spread over {', '.join(sorted(devices))}: load it on one device.")


def _quantised(vlm: nn.Module, tensors: Sequence[Tensor]) -> str | None:
    """What tells that a model is quantised; its whole numbers may be no parameters, and its layers still floats."""
    if getattr(getattr(vlm, "config", None), "quantization_config", None) is not None:
        return "its config has a quantization_config"
    layers = (type(module) for module in vlm.modules())
    kinds = (f"{kind.__module__}.{kind.__name__}" for kind in layers if ".quantized." in kind.__module__)
    return next((str(tensor.dtype) for tensor in tensors if tensor.dtype not in FLOATS), next(kinds, None))


def warn_of_another(image_processor: Any, config: Any, name: str) -> None:
    """Warn of an image processor that transformers pairs neither with a VLM nor with its tower: another model's, perhaps.

    It may make the right shapes all the same, with another mean, and then all is trained and measured on wrong pixels.

    Args:
        image_processor: Of the VLM's processor.
        config: Of the VLM.
        name: Of its class, for the warning.
    """
    tower = getattr(getattr(config, "vision_config", None), "model_type", "")
    kinds = (config.model_type, re.sub("_vision(_model)?$", "", tower))
    pairs = (pair for kind in kinds if (pair := IMAGE_PROCESSOR_MAPPING_NAMES.get(kind)))
    # By backend; some releases have a tuple, with None for one that is not there.
    known = {each for pair in pairs for each in (pair.values() if isinstance(pair, Mapping) else pair) if each}
    plain = dict.fromkeys(re.sub("(Fast|Pil)$", "", each) for each in sorted(known))
    mine = type(image_processor).__name__
    if plain and re.sub("(Fast|Pil)$", "", mine) not in plain:
        warnings.warn(
            f"the image processor is a {mine}, and transformers pairs {name} with {' or '.join(plain)}: if it is another "
            "model's, load this one's with AutoProcessor.from_pretrained.",
            stacklevel=3,
        )


def need_hook(vlm: Any, name: str, *more: str) -> None:
    """Refuse a model, or a class of that name, without transformers' hook for image features.

    Raises:
        ValueError: With its name and what is missing.
    """
    for needed in ("get_image_features", *more):
        if not hasattr(vlm, needed):
            raise ValueError(f"{name} has no {needed}(), which tells what its language model reads of an image.")


def need_gradient(
    model: nn.Module, read: Callable[[Tensor], Tensor], images: Tensor, names: tuple[str, str]
) -> tuple[Tensor, Tensor]:
    """What a model reads of images, and the gradient of its square to them.

    Args:
        model: Whose modules are looked at.
        read: From images to what is read.
        images: Shape (batch, 3, height, width).
        names: Of the model and of its processor, for errors.

    Raises:
        ValueError: If the model can not read them, or no gradient comes back: with the module that cuts it.
    """
    try:
        with torch.enable_grad(), attack_mode(model):
            output = read(images.requires_grad_())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{names[0]} can not read what {names[1]} makes, which is another model's: {error}"
        ) from error
    gradient = _gradient(output, images)
    if gradient is None:
        cut = _cut(model, read, images) or names[1]
        raise ValueError(f"no gradient reaches the pixels of {names[0]}: {cut} cuts it.")
    return output, gradient


def _gradient(output: Tensor, images: Tensor) -> Tensor | None:
    """Of the output's square to the images; None if there is none."""
    if not output.requires_grad:
        return None
    try:
        with torch.enable_grad():
            total = output.float().square().sum()
        return torch.autograd.grad(total, images, retain_graph=True, allow_unused=True)[0]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # an operation without a derivative
        return None


def _cut(model: nn.Module, read: Callable[[Tensor], Tensor], images: Tensor) -> str | None:
    """Path of the first module that a gradient goes into and does not come out of."""
    seen: list[tuple[str, Tensor]] = []

    def look(path: str) -> Any:
        def hook(module: nn.Module, inputs: Any, named: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else getattr(output, "last_hidden_state", output)
            reaches = any(isinstance(value, Tensor) and value.requires_grad for value in (*inputs, *named.values()))
            if reaches and isinstance(tensor, Tensor):
                seen.append((path, tensor))

        return hook

    modules = [(path, module) for path, module in model.named_modules() if path]
    hooks = [module.register_forward_hook(look(path), with_kwargs=True) for path, module in modules]
    try:
        with torch.enable_grad(), attack_mode(model):
            read(images)
    finally:
        for handle in hooks:
            handle.remove()
    return next((path for path, tensor in seen if _gradient(tensor, images) is None), None)
