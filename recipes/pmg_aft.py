"""Harden a CLIP with PMG-AFT, and measure it before and after.

The demo, offline, in minutes on two cores:

    accelerate launch recipes/pmg_aft.py

The published setting (Tiny-ImageNet, ViT-B/32, eps 1/255), on as many GPUs as accelerate is configured for:

    accelerate launch recipes/pmg_aft.py --config hf_robust_vision/configs/pmg_aft_vitb32_tinyimagenet_eps1.yaml

Every argument of the YAML file can be given on the command line, which wins.
"""

from __future__ import annotations

from hf_robust_vision.methods.pmg_aft import PMGAFTTrainer
from hf_robust_vision.pipeline import parse, run
from hf_robust_vision.processes import part
from hf_robust_vision.terminal import user_errors


def main() -> None:
    """Parse and run; bad input ends in one line."""
    with user_errors():
        run(PMGAFTTrainer, *parse(PMGAFTTrainer))
        part()


if __name__ == "__main__":
    main()
