"""Find CLIP and SigLIP vision towers in models, and swap hardened weights in and out of them."""

from hf_robust_vision.towers.weights import load_state_dict

from .open_clip import hf_to_openclip, interpolate_positions, openclip_to_hf
from .report import SwapReport, TowerReport
from .source import Source, load_source
from .swap import swap_vision_encoder
from .towers import find_towers


__all__ = [
    "Source",
    "SwapReport",
    "TowerReport",
    "find_towers",
    "hf_to_openclip",
    "interpolate_positions",
    "load_source",
    "load_state_dict",
    "openclip_to_hf",
    "swap_vision_encoder",
]
