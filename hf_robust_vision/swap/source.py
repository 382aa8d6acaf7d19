"""Whatever a hardened encoder comes as, turned into weights and what is known about them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from hf_robust_vision.pixels import PixelTransform
from hf_robust_vision.towers.adapters import CONFIG_FILE, holds_adapter, merge_into, original_of
from hf_robust_vision.towers.load import load_stock
from hf_robust_vision.towers.weights import is_weights_file, load_state_dict, local_or_hub

from .layouts import Geometry, SiglipTower, Tower
from .open_clip import POSITIONS, PROJECTION, square_side
from .siglip import HEAD, vision_state
from .towers import check_writable, find_towers


@dataclass(frozen=True)
class PixelSettings:
    """What an image processor does to pixels; None where it is not told."""

    mean: tuple[float, ...]  # zeros without normalisation
    std: tuple[float, ...]  # ones without
    rescale: float | None = None  # factor from whole numbers to fractions
    resample: int | None = None  # PIL's code
    size: tuple[int, int] | None = None  # height and width


@dataclass(frozen=True)
class Source:
    """Weights of a hardened encoder."""

    name: str  # where they come from, for the report; never a whole local path
    state: dict[str, Tensor]  # keys of transformers, with the `visual_projection.weight` of a CLIP if there is one
    geometry: Geometry | None = None  # None for a bare state dict, which does not tell the settings
    pixels: PixelSettings | None = None  # None where unknown
    tower: Tower | None = None  # the encoder itself, where the source is a model
    original: dict[str, Tensor] | None = None  # what it was trained from, which only an adapter names

    @property
    def kind(self) -> type[Tower]:
        """A plain tower of the source's family."""
        return Tower if "embeddings.class_embedding" in self.state else SiglipTower

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return len(self.state[POSITIONS]) - self.kind.class_tokens

    def completed(self, donor: Geometry, asked: Mapping[str, Any]) -> Geometry:
        """The whole geometry: sizes from the weights, settings as `asked`, as the source tells, or those of `donor`."""
        settings = replace(self.geometry or donor, **asked)
        embeddings = self.state["embeddings.patch_embedding.weight"]
        patch = embeddings.shape[-1]
        # A config's image size need not be a multiple of the patch; it stands where it gives as many patches.
        side = square_side(self.num_patches)
        image_size = settings.image_size if settings.image_size // patch == side else side * patch
        return replace(
            settings,
            hidden_size=embeddings.shape[0],
            num_hidden_layers=1 + max(int(k.split(".")[2]) for k in self.state if k.startswith("encoder.layers.")),
            intermediate_size=len(self.state["encoder.layers.0.mlp.fc1.bias"]),
            patch_size=patch,
            image_size=image_size,
        )


def load_source(source: Any, *, base: Any = None) -> Source:
    """Read a hardened encoder from a model, a state dict, a file, a folder or a Hub id.

    Args:
        source: A model with one CLIP or SigLIP tower; a state dict of Hugging Face's or open_clip's layout; a
            `.safetensors` or `.pt` file of one; a folder or Hub id of such a model, of its vision half, or of a PEFT
            adapter.
        base: The model that an adapter was trained on, or its folder or Hub id; by default the one that it names.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is not the whole of a vision tower.
    """
    if base is not None and not isinstance(source, str | Path):
        raise ValueError(f"base= belongs to a PEFT adapter folder, but source is a {type(source).__name__}.")
    if isinstance(source, nn.Module):
        return _from_model(source, f"a {type(source).__name__} in memory")
    if isinstance(source, Mapping):
        return Source("a state dict in memory", vision_state(source))
    if not isinstance(source, str | Path):
        raise TypeError(
            f"source is a {type(source).__name__}; wanted a CLIP model, a SigLIP model, a state dict, or the path or Hub "
            "id of one."
        )
    if is_weights_file(source):
        return Source(Path(source).name, vision_state(load_state_dict(source)))
    place = local_or_hub(source)
    name = Path(place).resolve().name if Path(place).is_dir() else place  # the report is published
    if holds_adapter(place):
        return _from_adapter(place, name, base)
    if base is not None:
        raise ValueError(f"base= belongs to a PEFT adapter folder, but {name} has no {CONFIG_FILE}.")
    return _from_model(load_stock(place, dtype="auto"), name, pixels=_pixels(place))


def reference_tower(state: dict[str, Tensor], geometry: Geometry) -> Tower:
    """A `CLIPVisionModel` or `SiglipVisionModel` of these weights in evaluation mode, to compare with."""
    # Built on no device and given the weights themselves: no second copy of a large tower.
    kind, settings = Source("", state).kind, asdict(geometry)
    with torch.device("meta"):
        model: Any = (
            SiglipVisionModel(SiglipVisionConfig(**settings, vision_use_head=set(state) >= HEAD))
            if kind is SiglipTower
            else CLIPVisionModel(CLIPVisionConfig(**settings))
        )
    model.load_state_dict({k: v for k, v in state.items() if k != PROJECTION}, strict=True, assign=True)
    positions = state[POSITIONS]
    model.embeddings.position_ids = torch.arange(len(positions), device=positions.device)[None]
    return kind("", model.eval())


def processor_pixels(processor: Any) -> PixelSettings | None:
    """Settings of an image processor, or of the one inside a processor; None where mean or std is unknown."""
    images = getattr(processor, "image_processor", processor)
    mean, std = getattr(images, "image_mean", None), getattr(images, "image_std", None)
    if mean is None or std is None:
        return None
    if getattr(images, "do_normalize", None) is False:
        mean, std = (0.0,) * len(mean), (1.0,) * len(std)
    rescales = getattr(images, "do_rescale", None)
    rescale = None if rescales is None else getattr(images, "rescale_factor", None) if rescales else 1.0
    resample = getattr(images, "resample", None)
    sides = getattr(images, "crop_size" if getattr(images, "do_center_crop", False) else "size", None)
    height, width = (dict(sides or {}).get(side) for side in ("height", "width"))
    size = (int(height), int(width)) if height and width else None
    return PixelSettings(tuple(mean), tuple(std), rescale, None if resample is None else int(resample), size)


def _from_model(model: nn.Module, name: str, pixels: PixelSettings | None = None) -> Source:
    towers = find_towers(model)
    if len(towers) > 1:
        families = " and ".join(sorted({tower.family for tower in towers}))
        raise ValueError(
            f"source has {len(towers)} {families} towers ({', '.join(tower.path for tower in towers)}): pass the one "
            "wanted."
        )
    check_writable(towers[0])
    transform = getattr(model, "transform", None)
    if pixels is None and isinstance(transform, PixelTransform):
        pixels = PixelSettings(
            tuple(transform.mean), tuple(transform.std), resample=transform.resample, size=transform.crop
        )
    return Source(name, towers[0].clip_state(), towers[0].geometry, pixels, towers[0])


def _pixels(name: str) -> PixelSettings | None:
    auto: Any = AutoImageProcessor
    try:
        return processor_pixels(auto.from_pretrained(name))
    except (OSError, ValueError):
        return None  # many folders of weights have no processor; the comparison is then reported as not made


def _from_adapter(folder: str, name: str, base: Any) -> Source:
    base = base if base is not None else original_of(folder)[0]
    pixels = None if isinstance(base, nn.Module) else _pixels(str(base))
    model = copy.deepcopy(base) if isinstance(base, nn.Module) else load_stock(base, dtype="auto")
    towers = find_towers(model)
    original = {name: value.clone() for tower in towers for name, value in tower.clip_state().items()}
    merge_into(model, folder, part=[tower.module for tower in towers])
    return replace(_from_model(model, name, pixels=pixels), original=original)
