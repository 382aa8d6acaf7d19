"""The hardened twins of the demo models, shipped as vision towers in half precision and joined with the rest at load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoProcessor

from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.swap.swap import swap_vision_encoder
from hf_robust_vision.towers.load import load_encoder, load_named
from hf_robust_vision.towers.weights import load_state_dict


TWINS = {"demo-clip-hardened": "demo-clip", "demo-llava-hardened": "demo-llava"}  # and what each is the twin of
TOWER_FILE = "hardened_tower.safetensors"  # beside the original's weights
TRAINED = ("vision_model.", "visual_projection.")  # all that hardening may change


def load_twin(name: str) -> Any:
    """A hardened demo model in float32: a `CLIPEncoder`, or a stock LLaVA with the tower swapped in.

    Raises:
        ValueError: If there is no twin of that name.
    """
    if name not in TWINS:
        raise ValueError(f"no hardened twin {name!r}; there are {', '.join(TWINS)}.")
    original = demo_checkpoint(TWINS[name])
    clip = load_encoder(demo_checkpoint())
    state = load_state_dict(original / TOWER_FILE)
    left = clip.load_state_dict({key: value.float() for key, value in state.items()}, strict=False)
    if left.unexpected_keys or any(key.startswith(TRAINED) for key in left.missing_keys):
        raise ValueError(
            f"{original / TOWER_FILE} is not the whole tower of the demo CLIP: install the package again."
        )
    if original == demo_checkpoint():
        return clip.eval()
    vlm = load_named(original)
    swap_vision_encoder(vlm, clip, processor=AutoProcessor.from_pretrained(original))
    return vlm


def write_twin(hardened: str | Path, name: str, folder: Path | None = None) -> Path:
    """Write the tower of a hardened `CLIPModel` folder in half precision, as the twin `name`.

    Args:
        hardened: Folder of the demo CLIP after hardening.
        name: One of `TWINS`.
        folder: Where the file goes; by default beside the weights of the original.

    Raises:
        ValueError: If the folder is not that of a hardened demo CLIP, or a weight overflows in half precision.
    """
    original, changed = load_encoder(demo_checkpoint()).state_dict(), load_encoder(hardened).state_dict()
    strange = [key for key, value in original.items() if not key.startswith(TRAINED) and not value.equal(changed[key])]
    if strange:
        raise ValueError(f"{hardened} differs from the demo CLIP in {strange[:3]}, which no twin holds.")
    tower = {key: value.half().contiguous() for key, value in changed.items() if key.startswith(TRAINED)}
    if not all(bool(torch.isfinite(value).all()) for value in tower.values()):
        raise ValueError(f"a weight of {hardened} overflows in half precision.")
    file = (folder or demo_checkpoint(TWINS[name])) / TOWER_FILE
    save_file(tower, file)
    return file
