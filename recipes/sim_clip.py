"""Harden a CLIP with Sim-CLIP, and measure it before and after.

The demo, offline, in minutes on two cores:

    accelerate launch recipes/sim_clip.py

The published setting (ImageNet, ViT-L/14, eps 4/255), on as many GPUs as accelerate is configured for:

    accelerate launch recipes/sim_clip.py --config hf_robust_vision/configs/sim_clip_vitl14_imagenet_eps4.yaml

Every argument of the YAML file can be given on the command line, which wins.
"""

from __future__ import annotations

import sys

from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.pipeline import USER_ERRORS, parse, run
from hf_robust_vision.processes import part


def main() -> None:
    """Parse, run, and turn bad input into one line."""
    try:
        options, args = parse(SimCLIPTrainer, demo_config="sim_clip_demo")
        run(SimCLIPTrainer, options, args)
        part()
    except USER_ERRORS as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
