# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-robust-vision[demo]"]
#
# [tool.uv.sources]
# hf-robust-vision = { path = "..", editable = true }
# ///
"""Harden a CLIP with FARE, and measure it before and after.

The demo, offline, in minutes on two cores:

    accelerate launch recipes/fare.py

The published setting (ImageNet, ViT-L/14, eps 4/255), on as many GPUs as accelerate is configured for:

    accelerate launch recipes/fare.py --config hf_robust_vision/configs/fare_vitl14_imagenet_eps4.yaml

Every argument of the YAML file can be given on the command line, which wins.
"""

from __future__ import annotations

from hf_robust_vision.methods.fare import FARETrainer
from hf_robust_vision.pipeline import main


if __name__ == "__main__":
    main(FARETrainer)
