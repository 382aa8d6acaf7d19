"""Published towers to stock folders, and stock folders to what older environments read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

from hf_robust_vision.towers.load import load_stock
from hf_robust_vision.towers.processors import load_image_processor, load_tokenizer
from hf_robust_vision.towers.weights import load_state_dict

from .open_clip import PROJECTION, clip_state, hf_to_openclip
from .swap import swap_vision_encoder
from .towers import find_towers


_CLIP = (
    CLIPModel,
    CLIPVisionModelWithProjection,
    CLIPVisionModel,
)  # open_clip keeps SigLIP's towers in another layout


def convert_checkpoint(
    checkpoint: str | Path,
    base: str,
    output: str | Path,
    *,
    hidden_act: str | None = None,
    num_attention_heads: int | None = None,
) -> Path:
    """Put a vision state dict of open_clip, as FARE, TeCoA and Sim-CLIP publish them, into a stock `CLIPModel` folder.

    It does not tell its activation, its number of heads, or the text tower that goes with it: all three come from `base`,
    folder or Hub id of the `CLIPModel` that was fine-tuned. A base with another `hidden_act` or `num_attention_heads` is
    refused where these are given.

    Raises:
        ValueError: If a setting or a shape differs, naming both, or anything can not be read. Nothing is written then.
    """
    folder = _free(output)
    state = clip_state(load_state_dict(checkpoint))
    if PROJECTION not in state:
        raise ValueError(
            f"{checkpoint} has no projection (`proj`); its embeddings would not match the text of {base}."
        )
    # All of them before anything is written, so that a base that lacks one leaves no half a folder.
    model, *processors = load_stock(base, (CLIPModel,), dtype="auto"), load_image_processor(base), load_tokenizer(base)
    for name, wanted in (("hidden_act", hidden_act), ("num_attention_heads", num_attention_heads)):
        if wanted is not None and getattr(model.config.vision_config, name) != wanted:
            found = getattr(model.config.vision_config, name)
            raise ValueError(f"{base} has {name}={found!r}, wanted {wanted!r}; name another --base.")
    try:
        # A `CLIPModel` is swapped like a VLM: the same checks, and the same comparison afterwards.
        swap_vision_encoder(model, state)
    except ValueError as error:
        raise ValueError(
            f"{checkpoint} is no fine-tuned {base}; name the --base that it started from. {error}"
        ) from error
    for part in (model, *processors):
        part.save_pretrained(folder)
    return folder


def export_open_clip(model_folder: str, output: str | Path) -> str:
    """Write the vision tower of a `CLIPModel` into a `.pt` file of open_clip's layout; returns the lines to paste there.

    Raises:
        ValueError: If the model has no projection or is not whole.
    """
    config, state = _vision_half(model_folder)
    if PROJECTION not in state:
        raise ValueError(
            f"{model_folder} has no projection ({PROJECTION}), which open_clip's tower ends in: name the CLIPModel that "
            "the tower belongs to, or export with --to v4."
        )
    if Path(output).is_dir():
        raise ValueError(f"--output {output} is a folder; wanted a .pt file to write.")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value.detach().clone() for name, value in hf_to_openclip(state).items()}, output)
    quick = config.hidden_act == "quick_gelu"
    heads = config.num_attention_heads
    return "\n".join(
        [
            f"# open_clip: width {config.hidden_size}, {config.num_hidden_layers} layers, patch {config.patch_size}, "
            f"{config.image_size} px, {heads} heads (open_clip derives heads from head_width={config.hidden_size // heads})",
            "model, _, _ = open_clip.create_model_and_transforms("
            f"'<the same architecture>', pretrained='<that of its text tower>', force_quick_gelu={quick})",
            "# with pretrained=None the text tower is random: then only model.visual is of use",
            f"model.visual.load_state_dict(torch.load({Path(output).name!r}, weights_only=True), strict=True)",
            "# OpenFlamingo: model.vision_encoder.load_state_dict(...) with the same file; its activation, "
            f"model.vision_encoder.transformer.resblocks[0].mlp.gelu, must be {'QuickGELU' if quick else 'GELU'}",
        ]
    )


def export_v4(model_folder: str, output: str | Path) -> str:
    """Write the vision tower of a `CLIPModel` into a folder of transformers 4's layout; returns the lines to paste there.

    The original LLaVA code loads its tower by name from `config.mm_vision_tower`.

    Raises:
        ValueError: If it holds another model, is not whole, or has no image processor. Nothing is written then.
    """
    folder = _free(output)
    own, weights = _vision_half(model_folder)
    processor = load_image_processor(model_folder).to_dict()
    state = {f"vision_model.{name}": value.contiguous() for name, value in weights.items() if name != PROJECTION}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = own.to_dict() | {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    # transformers 4 reads this file, and knows the class by the name that it had there.
    processor |= {"image_processor_type": "CLIPImageProcessor", "feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2, default=str) + "\n")
    return f"config.mm_vision_tower = {folder.name!r}  # the folder's path; then load_pretrained_model(...) as usual"


def _vision_half(model_folder: str) -> tuple[Any, dict[str, Tensor]]:
    """Config and weights, under CLIP keys, of the vision tower in a folder."""
    (tower,) = find_towers(load_stock(model_folder, _CLIP, dtype="auto"))
    return tower.module.config, tower.clip_state()


def _free(output: str | Path) -> Path:
    """The folder to write; it is made when everything is known to be fine."""
    if Path(output).is_file():
        raise ValueError(f"--output {output} is a file; wanted a folder to write.")
    return Path(output)
