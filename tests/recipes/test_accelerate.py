"""Recipes under `accelerate launch`: as many processes as the file says, and files that accelerate itself can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from transformers import CLIPModel

from hf_robust_vision.trainers.launchers import check_launcher
from tests.trainers.helpers import SGD, largest_gap
from tests.trainers.ranks import final, free_port, said, start


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


@pytest.mark.slow
def test_an_evaluation_is_shared_out(clip_folder, image_folder, tmp_path):
    """The command line joins the launcher's processes itself; without that each would measure everything."""
    words = ["evaluate", clip_folder, "--dataset", image_folder, "--templates", "demo", "--eps", "1/255", "--steps", 1]
    words += ["--max_samples", 5, "--output_dir", tmp_path, "--save_examples", 0]
    file = ROOT / "recipes" / "accelerate" / "cpu_2proc.yaml"
    done = launch(["--config_file", file, "-m", "hf_robust_vision.cli", *words])
    said_both, wrong = done.communicate(timeout=600)
    assert done.returncode == 0, wrong
    (result,) = json.loads((tmp_path / "robustness.json").read_text())["results"]
    samples = [json.loads(line)["id"] for line in (tmp_path / result["samples"]).read_text().splitlines()]
    assert len(samples) == len(set(samples)) == 5
    assert not list(tmp_path.glob("*.rank*"))
    assert said_both.count("report.html") == 1


@pytest.mark.slow
def test_two_machines_train_one_model(clip_folder, tmp_path):
    """Two launchers that only know each other's address; the second starts first, as nodes of a cluster may."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = SGD | {"clip": str(clip_folder), "double": True, "max_steps": 3}
    assert start(clip_folder, one, per_device_train_batch_size=4, **settings) == [0], said(one)
    two.mkdir()
    words = json.dumps(settings | {"output_dir": str(two), "world_size": 2, "per_device_train_batch_size": 2})
    there = ["--num_processes", 2, "--main_process_port", free_port(), "-m", "tests.trainers.run_training", words]
    machines = [
        launch(
            ["--config_file", ROOT / "recipes" / "accelerate" / "multi_node.yaml", "--machine_rank", number, *there]
        )
        for number in (1, 0)
    ]
    for machine in machines:
        _, wrong = machine.communicate(timeout=600)
        assert machine.returncode == 0, wrong
    assert largest_gap(final(two, 0), final(two, 1)) == 0
    assert largest_gap(final(two), final(one)) < 1e-10


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_accelerate_reads_the_file(file):
    """With its own loader, which refuses names it does not know; every file starts several processes."""
    config = load_config_from_file(str(file))
    assert config.num_processes == (2 if file.stem == "cpu_2proc" else 8 * config.num_machines)
    assert config.use_cpu == (file.stem == "cpu_2proc")
    assert config.mixed_precision == "no", "the recipe decides, and writes it into the results"


def test_the_fsdp_file_passes_our_own_check(monkeypatch):
    """Turned into the variables that a launched process sees, by accelerate's own launcher."""
    file = str(ROOT / "recipes" / "accelerate" / "fsdp2.yaml")
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", file, "recipe.py"]))
    for name, value in prepare_multi_gpu_env(args).items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    accelerator = SimpleNamespace(
        mixed_precision="no", state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=None)
    )
    check_launcher(accelerator, adapter=False)
