# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-robust-vision[demo]"]
#
# [tool.uv.sources]
# hf-robust-vision = { path = "..", editable = true }
# ///
"""Harden a CLIP with AGFT, and measure it before and after.

The demo, offline, in minutes on two cores:

    accelerate launch recipes/agft.py

The published setting (ImageNet, ViT-B/32, eps 1/255), on as many GPUs as accelerate is configured for:

    accelerate launch recipes/agft.py --config hf_robust_vision/configs/agft_vitb32_imagenet_eps1.yaml

Every argument of the YAML file can be given on the command line, which wins.
"""

from __future__ import annotations

from hf_robust_vision.methods.agft import AGFTTrainer
from hf_robust_vision.pipeline import main


if __name__ == "__main__":
    main(AGFTTrainer)
