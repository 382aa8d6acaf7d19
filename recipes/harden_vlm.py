"""Harden the vision tower of a vision-language model in place, where its language model looks.

The demo LLaVA, offline, asked under attack before and after:

    accelerate launch recipes/harden_vlm.py

Any VLM of a supported family, on images of any kind, without labels:

    accelerate launch recipes/harden_vlm.py --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --dataset_name my/photos

The language model is neither run nor loaded; `--output_dir` is the whole VLM in its stock folder.
"""

from __future__ import annotations

from hf_robust_vision.pipeline import parse
from hf_robust_vision.pipeline.harden_vlm import VLMArguments, VLMTrainer, harden_vlm
from hf_robust_vision.processes import part
from hf_robust_vision.terminal import user_errors


def main() -> None:
    """Parse and run; bad input ends in one line."""
    with user_errors():
        harden_vlm(*parse(VLMTrainer, options=VLMArguments, name="harden-vlm"))
        part()


if __name__ == "__main__":
    main()
