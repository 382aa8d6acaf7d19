# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-robust-vision[demo]"]
#
# [tool.uv.sources]
# hf-robust-vision = { path = "..", editable = true }
# ///
"""Harden a CLIP with TeCoA, and measure it before and after.

The demo, offline, in minutes on two cores:

    accelerate launch recipes/tecoa.py

The published setting (ImageNet, ViT-B/32, eps 1/255), on as many GPUs as accelerate is configured for:

    accelerate launch recipes/tecoa.py --config hf_robust_vision/configs/tecoa_vitb32_imagenet_eps1.yaml

Every argument of the YAML file can be given on the command line, which wins.
"""

from __future__ import annotations

from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.pipeline import main


if __name__ == "__main__":
    main(TeCoATrainer)
