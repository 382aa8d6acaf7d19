"""Recipes under `accelerate launch`: as many processes as the file says, and files that accelerate itself can read."""

from __future__ import annotations

import json
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file
from transformers import CLIPModel

from hf_robust_vision.training.launchers import check_launcher
from tests.launcher import ROOT, TWO, launch, outcome, recipe
from tests.towers import zoo
from tests.training.helpers import SGD, largest_gap
from tests.training.ranks import final, free_port, said, start


FILES = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)


def ids_of(output, result):
    """Of the samples of a result, which nobody has left in a file of a single process."""
    assert not list(output.glob("*.rank*"))
    return [json.loads(line)["id"] for line in (output / result["samples"]).read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        ("tecoa", TWO),
        *(pytest.param(name, TWO, marks=pytest.mark.slow) for name in ("sim_clip", "tima", "fare", "agft", "pmg_aft")),
        pytest.param("sim_clip", TORCHRUN, marks=pytest.mark.slow),
    ],
    ids=["tecoa", "sim_clip", "tima", "fare", "agft", "pmg_aft", "sim_clip-torchrun"],
)
def test_a_recipe_runs_in_two_processes(name, launcher, clip_folder, image_folder, tmp_path):
    """Of 5 test images one process measures 3, the other 2, and nobody measures one twice."""
    output = tmp_path / "out"
    status, said, wrong = outcome(launch(*launcher, *recipe(name, clip_folder, image_folder, output)))
    assert status == 0, wrong
    assert said.count("processes: 2 (MULTI_CPU), an update sees 4 images (2 x 2 x 1)") == 1
    results = json.loads((output / "robustness.json").read_text())["results"]
    assert [result["model"] for result in results] == ["before", "after"]
    assert results[1]["training"]["world_size"] == 2
    for result in results:
        assert len(ids_of(output, result)) == len(set(ids_of(output, result))) == 5
    assert CLIPModel.from_pretrained(output).num_parameters() > 0


@pytest.mark.slow
def test_an_evaluation_is_shared_out(clip_folder, image_folder, tmp_path):
    """The command line joins the launcher's processes itself; without that each would measure everything."""
    words = ["evaluate", clip_folder, "--dataset", image_folder, "--templates", "demo", "--eps", "1/255", "--steps", 1]
    words += ["--max_samples", 5, "--output_dir", tmp_path, "--save_examples", 0, "--device", "cpu"]
    status, said, wrong = outcome(launch(*TWO, "-m", "hf_robust_vision.cli", *words))
    assert status == 0, wrong
    (result,) = json.loads((tmp_path / "robustness.json").read_text())["results"]
    assert len(ids_of(tmp_path, result)) == len(set(ids_of(tmp_path, result))) == 5
    assert said.count("report.html") == 1


@pytest.mark.slow
def test_the_list_of_datasets_is_shared_out(clip_folder, image_folder, tmp_path):
    entry = {"name": "folder", "dataset": str(image_folder), "templates": "photo", "max_samples": 5}
    file, output = tmp_path / "list.yaml", tmp_path / "out"
    file.write_text(json.dumps({"protocol": "quick", "steps": 1, "eps": ["1/255"], "datasets": [entry]}))
    words = [clip_folder, "--datasets", file, "--output_dir", output, "--save_examples", 0, "--device", "cpu"]
    status, said, wrong = outcome(launch(*TWO, ROOT / "recipes" / "evaluate.py", *words))
    assert status == 0, wrong
    (result,) = json.loads((output / "robustness.json").read_text())["results"]
    assert len(ids_of(output, result)) == len(set(ids_of(output, result))) == 5
    assert said.count("report.html") == 1


@pytest.mark.parametrize("name", ["research/compare", "research/compare_towers", "swap_llava"])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_recipes_of_one_process_refuse_a_launcher(name, rank, monkeypatch):
    """Every process would write the same files."""
    monkeypatch.syspath_prepend(ROOT / "recipes")
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="__main__")
    wanted = f"error: {name}.py runs in one process, and a launcher started 2; type python recipes/{name}.py"
    assert caught.value.code == (wanted if rank == "0" else 1)


@pytest.mark.slow
def test_two_machines_train_one_model(clip_folder, tmp_path):
    """Two launchers that only know each other's address; the second starts first, as nodes of a cluster may."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = SGD | {"clip": str(clip_folder), "double": True, "max_steps": 3}
    assert start(clip_folder, one, per_device_train_batch_size=4, **settings) == [0], said(one)
    two.mkdir()
    words = json.dumps(settings | {"output_dir": str(two), "world_size": 2, "per_device_train_batch_size": 2})
    file = ROOT / "recipes" / "accelerate" / "multi_node.yaml"
    here = ["-m", "accelerate.commands.launch", "--config_file", file, "--machine_rank"]
    there = ["--num_processes", 2, "--main_process_port", free_port(), "-m", "tests.training.run_training", words]
    for machine in [launch(*here, number, *there) for number in (1, 0)]:
        status, _, wrong = outcome(machine)
        assert status == 0, wrong
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


def test_the_deepspeed_file_passes_our_own_check(monkeypatch):
    """The same for DeepSpeed, which need not be installed for it."""
    file = str(ROOT / "recipes" / "accelerate" / "deepspeed_zero2.yaml")
    args, config, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", file, "recipe.py"])
    )
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config)  # as its launch command does
    _, variables = prepare_deepspeed_cmd_env(args)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == 2
    assert plugin.deepspeed_config["gradient_accumulation_steps"] == "auto", "the recipe decides"
    accelerator = SimpleNamespace(
        mixed_precision="no", state=SimpleNamespace(fsdp_plugin=None, deepspeed_plugin=plugin)
    )
    check_launcher(accelerator, adapter=False)


@pytest.mark.slow
def test_a_vlm_is_hardened_in_two_processes(image_folder, tmp_path):
    """One of them writes the whole VLM, of which the tower alone has changed."""
    zoo.saved("llava", tmp_path / "vlm")
    output = tmp_path / "out"
    words = ["--model_name_or_path", tmp_path / "vlm", "--dataset_name", image_folder, "--output_dir", output]
    words += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--attack_eps", "8/255", "--learning_rate", 1e-2]
    words += ["--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true", "--use_cpu", "true"]
    status, said, wrong = outcome(launch(*TWO, ROOT / "recipes" / "harden_vlm.py", *words))
    assert status == 0, wrong
    assert said.count("the whole VLM lies in") == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (tmp_path / "vlm", output))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("vision_tower" in name for name in changed)
    report = json.loads((output / "harden_report.json").read_text())
    assert report["training"]["world_size"] == 2
