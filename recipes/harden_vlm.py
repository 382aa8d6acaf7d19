# /// script
# requires-python = ">=3.11"
# dependencies = ["hf-robust-vision[demo]"]
#
# [tool.uv.sources]
# hf-robust-vision = { path = "..", editable = true }
# ///
"""Harden the vision tower of a vision-language model in place, where its language model looks.

The demo LLaVA, offline, asked under attack before and after:

    accelerate launch recipes/harden_vlm.py

Any VLM of a supported family, on images of any kind, without labels:

    accelerate launch recipes/harden_vlm.py --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --dataset_name my/photos

The language model is neither run nor loaded; `--output_dir` is the whole VLM in its stock folder.
"""

from __future__ import annotations

from hf_robust_vision.pipeline.harden_vlm import main


if __name__ == "__main__":
    main()
