"""Recipes under `accelerate launch`: as many processes as the file says, and files that accelerate itself can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import CLIPModel


ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
RUN = """--max_steps 2 --per_device_train_batch_size 2 --per_device_eval_batch_size 4 --attack_steps 1 --test_steps 1
--validation_split validation --test_eps 1/255 --attack_eps 1/255 --report_to none --templates demo --logging_steps 1
--save_strategy no --disable_tqdm true --max_test_samples 5"""


def launch(words, **settings):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings
    )


def recipe(clip_folder, image_folder, output):
    data = ["--model_name_or_path", clip_folder, "--dataset_name", image_folder, "--output_dir", output]
    return [ROOT / "recipes" / "tecoa.py", *data, *RUN.split()]


def test_a_recipe_runs_in_two_processes(clip_folder, image_folder, tmp_path):
    """Of 5 test images one process measures 3, the other 2, and nobody measures one twice."""
    output = tmp_path / "out"
    done = launch(
        [
            "--config_file",
            ROOT / "recipes" / "accelerate" / "cpu_2proc.yaml",
            *recipe(clip_folder, image_folder, output),
        ]
    )
    said, wrong = done.communicate(timeout=300)
    assert done.returncode == 0, wrong
    assert said.count("processes: 2 (MULTI_CPU), an update sees 4 images (2 x 2 x 1)") == 1
    results = json.loads((output / "robustness.json").read_text())["results"]
    assert [result["model"] for result in results] == ["before", "after"]
    assert results[1]["training"]["world_size"] == 2
    for result in results:
        samples = [json.loads(line)["id"] for line in (output / result["samples"]).read_text().splitlines()]
        assert len(samples) == len(set(samples)) == 5
    assert not list(output.glob("*.rank*"))
    assert CLIPModel.from_pretrained(output).num_parameters() > 0


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file(file):
    """With its own loader, which refuses names it does not know."""
    config = load_config_from_file(str(file))
    assert (config.use_cpu, config.num_processes) == (
        (True, 2) if file.stem == "cpu_2proc" else (False, config.num_processes)
    )
    assert config.num_processes >= 2
    assert config.mixed_precision == "no", "the recipe decides, and writes it into the results"
