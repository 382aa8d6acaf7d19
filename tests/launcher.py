"""Recipes and commands under a launcher, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[1]
TWO = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes" / "accelerate" / "cpu_2proc.yaml")
# With `use_cpu`, so that a machine with GPUs does the same.
SHORT = """--max_steps 1 --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --attack_steps 1 --test_steps 1
--validation_split validation --test_eps 1/255 --attack_eps 1/255 --report_to none --templates demo --logging_steps 1
--save_strategy no --disable_tqdm true --max_test_samples 5 --use_cpu true"""


def launch(*words, **variables) -> subprocess.Popen:
    """Start `python <words>` with more environment variables."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environment, **pipes)


def outcome(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit status, and what was said on both streams; ended after ten minutes, and where the test is."""
    try:
        said, wrong = process.communicate(timeout=600)
    except BaseException:
        process.terminate()  # a launcher ends its processes
        raise
    return process.returncode, said, wrong


def recipe(name, model, data, output, *more) -> list:
    """Words of a short run."""
    named = ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output]
    return [ROOT / "recipes" / f"{name}.py", *named, *SHORT.split(), *more]
