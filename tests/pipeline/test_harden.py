"""The recipe from parse to card, on a tiny folder model and a tiny image folder."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, CLIPModel

from hf_robust_vision import pipeline
from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.methods.agft import AGFTTrainer
from hf_robust_vision.methods.fare import FARETrainer
from hf_robust_vision.methods.pmg_aft import PMGAFTTrainer
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.methods.tima import TIMATrainer
from hf_robust_vision.pipeline import harden
from hf_robust_vision.pipeline.harden_vlm import VLMArguments, VLMTrainer
from hf_robust_vision.sanity import rivals
from hf_robust_vision.towers.base import weights_sha256
from hf_robust_vision.training.checkpoints import complete_checkpoint, mark_complete
from tests.cli.next_lines import next_lines
from tests.conftest import NAMES
from tests.methods.toy_method import ToyTrainer
from tests.training.ranks import CONTEXT, free_port


ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "sim_clip.py"
CONFIGS = sorted((ROOT / "hf_robust_vision" / "configs").glob("*.yaml"))
TRAINERS = {
    "agft": AGFTTrainer,
    "fare": FARETrainer,
    "pmg_aft": PMGAFTTrainer,
    "sim_clip": SimCLIPTrainer,
    "tecoa": TeCoATrainer,
    "tima": TIMATrainer,
}
SHORT_TEXT = """--max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 6 --attack_steps 2 --test_steps 3
--validation_split validation --test_eps 1/255 2/255 --attack_eps 1/255 --report_to none --use_cpu true
--templates demo --eval_attack_steps 2 --logging_steps 1 --save_strategy no --disable_tqdm true"""
SHORT = SHORT_TEXT.split()


def words(model, data, output, *more):
    named = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(output)]
    return [*named, *SHORT, *map(str, more)]


def run_recipe(monkeypatch, argv):
    """The recipe in this process, as `python recipes/sim_clip.py`."""
    monkeypatch.setattr(sys, "argv", [str(RECIPE), *argv])
    runpy.run_path(str(RECIPE), run_name="__main__")


@pytest.fixture(scope="module")
def finished(clip_folder, image_folder, tmp_path_factory):
    """One run through `accelerate launch`: its folder and what it printed."""
    output = tmp_path_factory.mktemp("run") / "out"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
    ]
    done = subprocess.run(
        [*launch, str(RECIPE), *words(clip_folder, image_folder, output)],
        capture_output=True, text=True, env=environment, cwd=output.parent, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return output, done.stdout


def test_files(finished):
    output, _ = finished
    names = {path.name for path in output.iterdir()}
    assert {"robustness.json", "robustness.png", "README.md", "config.json", "model.safetensors"} <= names
    assert (
        len([name for name in names if re.fullmatch(r"samples-.*\.jsonl", name)]) == 4
    )  # before and after, two radii
    assert not [name for name in names if ".rank" in name or name.startswith(".")]
    assert {"tokenizer.json"} <= names


def test_model_folder_is_stock_and_hardened(finished, clip_folder):
    output, _ = finished
    model, info = CLIPModel.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    original = CLIPModel.from_pretrained(clip_folder)
    results = load_results(output)
    hashes = {result.model: result.model_sha256 for result in results}
    assert hashes == {"before": weights_sha256(original), "after": weights_sha256(model)}
    assert hashes["before"] != hashes["after"]
    assert torch.equal(model.text_projection.weight, original.text_projection.weight)


def test_results_are_sums_over_their_files(finished):
    output, _ = finished
    results = load_results(output)
    assert [(result.model, round(result.eps * 255)) for result in results] == [
        ("before", 1), ("before", 2), ("after", 1), ("after", 2),
    ]  # fmt: skip
    for result in results:
        rows = [json.loads(line) for line in (output / result.samples).read_text().splitlines()]
        assert len(rows) == result.num_samples == 6
        assert result.clean_accuracy == sum(row["clean"] == row["label"] for row in rows) / 6
        assert result.robust_accuracy == sum(row["fooled_by"] is None for row in rows) / 6
        assert (result.training is not None) == (result.model == "after")
        assert (result.split, result.dataset, result.class_names) == ("test", "tiny-images", sorted(NAMES))
    assert results[2].training["steps"] == 2


def test_card_numbers_are_those_of_the_results(finished):
    output, _ = finished
    card = ModelCard.load(output / "README.md")
    after = [result for result in load_results(output) if result.model == "after"]
    wanted = [
        ("accuracy", after[0].clean_accuracy),
        *(("robust_accuracy", result.robust_accuracy) for result in after),
    ]
    assert [(row.metric_type, row.metric_value) for row in card.data.eval_results] == wanted
    text = (output / "README.md").read_text()
    for result in load_results(output):
        row = next(
            line for line in text.splitlines() if line.startswith(f"| {result.model} ") and _radius(result) in line
        )
        numbers = [float(number) for number in re.findall(r"([\d.]+) %", row)]
        assert numbers == [round(100 * result.clean_accuracy, 1), round(100 * result.robust_accuracy, 1)]
    assert str(output.parent) not in text, "a path of this machine means nothing to a reader"


def _radius(result):
    return f" {result.eps * 255:g}/255 "


def test_printed_table(finished):
    output, printed = finished
    for result in load_results(output):
        assert f"{100 * result.robust_accuracy:.1f} %" in printed
    # Three classes: findings-journey 10, what is said is what runs.
    assert re.search(
        r"1\. apgd-ce: APGD on cross-entropy, \d+ steps.*\n  linf, eps .*\n  left out.*few classes: apgd-dlr-targeted",
        printed,
    )
    assert re.search(r"measured in: before \d+ s, after \d+ s", printed)


class TestBadInput:
    """One clear error before any training, and no output folder."""

    @pytest.fixture(autouse=True)
    def _no_training(self, monkeypatch):
        monkeypatch.setattr(SimCLIPTrainer, "train", lambda *a, **k: pytest.fail("training started"))

    @pytest.fixture
    def refused(self, monkeypatch, tmp_path, clip_folder, image_folder):
        def check(said, *more, model=clip_folder, data=image_folder, output=tmp_path / "out"):
            existed = output.exists()
            with pytest.raises(SystemExit) as caught:
                run_recipe(monkeypatch, words(model, data, output, *more))
            message = str(caught.value.code)
            assert message.startswith("error: ")
            assert re.search(said, message), message
            assert "Traceback" not in message
            assert output.exists() == existed

        return check

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            (["--attack_eps", "4"], "--attack_eps=4/255"),
            (["--test_eps", "4"], "4/255"),
            (["--attack_norm", "l3"], "unknown norm 'l3'"),
            (["--test_protocol", "x"], "unknown protocol 'x'"),
            (["--train_split", "training"], "training"),
            (["--test_split", "train"], "train"),
            (["--templates", "nothing"], "neither a file nor one of the templates"),
            (["--class_names", "nothing.txt"], "nothing.txt is not a file"),
            (["--resume_from_checkpoint", "true"], "no complete checkpoint"),
            (["--test_restarts", "0"], "restarts"),
            (["--test_steps", "0"], "steps must be a whole number of at least 1"),  # findings-reliability 1 and 2
            (["--test_protocol", "autoattack", "--test_queries", "-5"], "queries must be"),
            (["--test_queries", "5"], "queries=5 changes nothing"),  # findings-reliability 8
            (["--max_validation_samples", "-1"], "max_validation_samples"),
        ],
        ids=lambda value: value[0] if isinstance(value, list) else "",
    )
    def test_arguments(self, refused, more, said):
        refused(said, *more)

    @pytest.mark.parametrize("count", [1, 2, 4])
    def test_class_names_that_do_not_match(self, refused, count, tmp_path):
        (tmp_path / "names.txt").write_text("\n".join("abcd"[:count]))
        refused("class", "--class_names", tmp_path / "names.txt")

    def test_folder_without_images(self, refused, tmp_path):
        (tmp_path / "empty").mkdir()
        refused("holds no images", data=tmp_path / "empty")

    def test_one_class(self, refused, image_folder, tmp_path):
        data = shutil.copytree(image_folder, tmp_path / "data")
        for split in ("train", "validation", "test"):
            for name in ("red", "green"):
                shutil.rmtree(data / split / name)
        refused("at least 2 classes", data=data)

    @pytest.mark.parametrize("split", ["train", "validation", "test"])
    def test_corrupt_image(self, refused, split, image_folder, tmp_path):
        data = shutil.copytree(image_folder, tmp_path / "data")
        broken = sorted((data / split / "red").iterdir())[0]
        broken.write_bytes(broken.read_bytes()[:300])
        refused(rf"{re.escape(str(broken))} is corrupt or truncated.*--skip_corrupt", data=data)

    def test_missing_weights(self, refused, clip_folder, tmp_path):
        model = shutil.copytree(clip_folder, tmp_path / "model")
        weights = load_file(model / "model.safetensors")
        del weights["logit_scale"]
        save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
        refused(r"lacks 1 weights.*logit_scale", model=model)

    def test_other_model_type(self, refused, tmp_path):
        BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(
            tmp_path / "m"
        )
        refused("'bert' model", model=tmp_path / "m")

    def test_adapter(self, refused, tmp_path):
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
        refused("adapter of 'base'", model=tmp_path / "m")

    def test_no_such_model(self, refused, tmp_path):
        refused("nothing-here", model=tmp_path / "nothing-here")

    def test_no_such_dataset(self, refused, tmp_path):
        refused("nothing-here", data=tmp_path / "nothing-here")

    def test_overwrite_deletes_nothing_before_all_else_is_right(self, refused, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.safetensors").write_text("precious")
        (tmp_path / "out" / "robustness.json").write_text("{}")  # what tells a run
        refused("nothing-here", "--overwrite", "true", model=tmp_path / "nothing-here")
        refused("nothing-here", "--overwrite", "true", data=tmp_path / "nothing-here")
        assert (tmp_path / "out" / "model.safetensors").read_text() == "precious"

    def test_a_launcher_that_is_refused_does_not_cost_the_earlier_run(self, refused, tmp_path, monkeypatch):
        """Accelerate's settings are known only when the trainer is made."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "robustness.json").write_text("{}")
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        refused("fp16", "--overwrite", "true")
        assert (tmp_path / "out" / "robustness.json").read_text() == "{}"

    def test_folder_that_holds_a_run(self, refused, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "model.safetensors").write_text("precious")
        refused(r"already holds a run; pass --resume_from_checkpoint true.*--overwrite true")
        assert (tmp_path / "out" / "model.safetensors").read_text() == "precious"


def test_overwrite_and_skip_corrupt(monkeypatch, clip_folder, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "data")
    broken = sorted((data / "test" / "red").iterdir())[0]
    broken.write_bytes(broken.read_bytes()[:300])
    output = tmp_path / "out"
    output.mkdir()
    (output / "old.txt").write_text("old")
    (output / "training_args.bin").write_text("what tells a run")
    with pytest.warns(UserWarning, match=r"skipped 1 corrupt images of data \(test\)"):
        run_recipe(monkeypatch, words(clip_folder, data, output, "--overwrite", "true", "--skip_corrupt", "true"))
    assert not (output / "old.txt").exists()
    assert {result.num_samples for result in load_results(output)} == {5}


def test_measure_false_only_trains(monkeypatch, clip_folder, image_folder, tmp_path, capsys):
    """And ends with where the model lies, and how it is measured."""
    output = tmp_path / "out"
    run_recipe(monkeypatch, words(clip_folder, image_folder, output, "--measure", "false"))
    said = capsys.readouterr().out
    assert f"model: {output}\n" in said
    assert next_lines(said) == [f"evaluate {output} --dataset {image_folder} --output_dir {output}"]
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "robustness.json").exists()


def test_the_demo_for_a_vlm_is_hardened_at_what_the_shipped_one_reads(tmp_path):
    """By the names of the shipped models, one of them in the config."""
    line = [
        "--config",
        "sim_clip_demo_llava",
        "--model_name_or_path",
        "demo-clip",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    line += ["--max_steps", "1", "--warmup_steps", "0", "--per_device_train_batch_size", "4", "--measure", "false"]
    line += ["--on_collapse", "record", "--attack_steps", "1"]
    pipeline.run(SimCLIPTrainer, *pipeline.parse(SimCLIPTrainer, line))
    found = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(demo_checkpoint() / "model.safetensors")
    changed = {key.split(".")[0] for key, value in original.items() if not torch.equal(value, found[key])}
    assert changed == {"vision_model"}


class TestConfigs:
    @pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
    def test_names_and_values_are_read(self, config):
        trainers = TRAINERS | {"harden_vlm": VLMTrainer}
        (trainer,) = (trainer for recipe, trainer in trainers.items() if config.stem.startswith(f"{recipe}_"))
        holds = {"options": VLMArguments} if trainer is VLMTrainer else {}
        line = ["--config", str(config), "--bf16", "false", "--use_cpu", "true"]
        options, args = pipeline.parse(trainer, line, **holds)
        for key, value in yaml.safe_load(config.read_text()).items():
            holder = options if hasattr(options, key) else args
            got = getattr(holder, key)
            if key == "test_eps":
                assert [float(eps) for eps in got] == [int(eps.split("/")[0]) / 255 for eps in value]
            elif isinstance(value, str) and "/255" in value:
                assert float(got) == int(value.split("/")[0]) / 255
            elif isinstance(value, str) and re.fullmatch(r"\de-\d", value):
                assert got == float(value)
            elif isinstance(got, str | int | float | bool):
                assert str(getattr(got, "value", got)) == str(value) or got == value, key

    @pytest.mark.parametrize("recipe", TRAINERS)
    def test_a_recipe_without_arguments_is_the_demo_of_its_method(self, recipe, monkeypatch):
        ran = []
        monkeypatch.setattr("hf_robust_vision.pipeline.run", lambda *args: ran.append(args))
        monkeypatch.setattr(sys, "argv", [f"{recipe}.py", "--use_cpu", "true"])
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
        ((trainer, _, args),) = ran
        wanted = yaml.safe_load((ROOT / "hf_robust_vision" / "configs" / f"{recipe}_demo.yaml").read_text())
        assert trainer is TRAINERS[recipe]
        assert isinstance(args, trainer.args_class)
        assert (args.output_dir, args.max_steps) == (wanted["output_dir"], wanted["max_steps"])

    def test_published_setting_on_a_stand_in(self, monkeypatch, clip_folder, image_folder, tmp_path):
        """Every path of the published file, with model and data swapped for tiny ones."""
        config = ROOT / "hf_robust_vision" / "configs" / "sim_clip_vitl14_imagenet_eps4.yaml"
        small = "--max_steps 2 --global_batch_size 4 --warmup_steps 1 --dataloader_num_workers 0 --use_cpu true"
        small += (
            " --eval_steps 1 --save_steps 1 --validation_size 3 --test_steps 2 --max_test_samples 5 --logging_steps 1"
        )
        named = words(clip_folder, image_folder, tmp_path / "out")[:6]
        run_recipe(
            monkeypatch,
            ["--config", str(config), *named, *small.split(), "--disable_tqdm", "true", "--class_names", ""],
        )
        results = load_results(tmp_path / "out")
        assert {result.split for result in results} == {"validation"}
        assert results[0].left_out == ["apgd-dlr-targeted"]
        assert results[-1].training["form"] == "frozen"
        assert results[-1].training["attack_steps"] == 10
        assert (tmp_path / "out" / "checkpoint-2").is_dir()

    def test_the_command_line_wins_and_strays_are_refused(self, tmp_path):
        (tmp_path / "c.yaml").write_text("output_dir: a\nmax_steps: 3\nlearning_rate: 1e-3\ntest_eps: [1/255]\n")
        _, args = pipeline.parse(SimCLIPTrainer, ["--config", str(tmp_path / "c.yaml"), "--max_steps", "5"])
        assert (args.output_dir, args.max_steps, args.learning_rate) == ("a", 5, 1e-3)
        (tmp_path / "c.yaml").write_text("output_dir: a\nmax_step: 3\n")
        with pytest.raises(ValueError, match=r"\['max_step'\] are no arguments of SimCLIPTrainer"):
            pipeline.parse(SimCLIPTrainer, ["--config", str(tmp_path / "c.yaml")])

    def test_fast_decides_over_a_file_and_not_over_what_is_typed(self):
        _, args = pipeline.parse(SimCLIPTrainer, ["--fast", "true"])  # the demo's file has attack_steps of its own
        assert (args.attack_steps, args.attack_token_share) == (2, 0.5)
        for typed in (["--attack_steps", "5"], ["--attack_token_share=1"], ["--no_attack_random_start"]):
            with pytest.raises(ValueError, match="fast decides attack_steps.*leave it out"):
                pipeline.parse(SimCLIPTrainer, ["--fast", "true", *typed])
        _, args = pipeline.parse(SimCLIPTrainer, ["--fast", "false", "--attack_steps", "5"])
        assert args.attack_steps == 5

    def test_demo_is_read_only_where_nothing_is_named(self):
        demo = ROOT / "hf_robust_vision" / "configs" / "sim_clip_demo.yaml"
        options, args = pipeline.parse(SimCLIPTrainer, ["--max_steps", "2"], demo)
        assert (options.max_test_samples, args.max_steps) == (128, 2)
        for given in ((demo,), ()):
            options, _ = pipeline.parse(SimCLIPTrainer, ["--model_name_or_path", "x", "--output_dir", "y"], *given)
            assert options.max_test_samples == 500

    @pytest.mark.parametrize("recipe", TRAINERS)
    def test_the_demo_of_a_method_is_found_by_its_name(self, recipe):
        """So `harden sim-clip` of the command line is the recipe (findings-code 4)."""
        wanted = yaml.safe_load((ROOT / "hf_robust_vision" / "configs" / f"{recipe}_demo.yaml").read_text())
        _, args = pipeline.parse(TRAINERS[recipe], ["--use_cpu", "true"])
        assert (args.output_dir, args.learning_rate) == (wanted["output_dir"], float(wanted["learning_rate"]))

    def test_a_method_without_a_demo_has_the_defaults(self):
        _, args = pipeline.parse(ToyTrainer, ["--use_cpu", "true", "--output_dir", "x"])
        assert (args.output_dir, args.toy_weight) == ("x", 1.0)

    def test_one_radius_needs_no_list(self, tmp_path):
        (tmp_path / "c.yaml").write_text("output_dir: a\ntest_eps: 8/255\n")
        options, _ = pipeline.parse(SimCLIPTrainer, ["--config", str(tmp_path / "c.yaml")])
        assert [float(eps) for eps in options.test_eps] == [8 / 255]


@pytest.mark.slow
def test_demo_meets_its_targets(tmp_path):
    """The promise of the README, on the real demo."""
    pytest.importorskip("easy_vqa")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(RECIPE), "--output_dir", str(tmp_path / "out")], env=environment, check=True)
    results = {(result.model, round(result.eps * 255)): result for result in load_results(tmp_path / "out")}
    before, after = results["before", 8], results["after", 8]
    assert before.robust_accuracy <= before.clean_accuracy / 2
    assert after.robust_accuracy >= before.robust_accuracy + 0.35
    assert after.clean_accuracy >= before.clean_accuracy - 0.05
    assert before.model_sha256 == weights_sha256(CLIPModel.from_pretrained(demo_checkpoint()))


def test_overwrite_deletes_nothing_but_runs(clip_folder, image_folder, tmp_path):
    """A mistyped output folder must not cost data."""
    (tmp_path / "thesis.txt").write_text("years of work")
    options, args = pipeline.parse(SimCLIPTrainer, words(clip_folder, image_folder, tmp_path, "--overwrite", "true"))
    with pytest.raises(ValueError, match="does not look like one"):
        pipeline.run(SimCLIPTrainer, options, args)
    (tmp_path / "robustness.json").write_text("{}")
    inside = tmp_path / "model"
    shutil.copytree(clip_folder, inside)
    options, args = pipeline.parse(SimCLIPTrainer, words(inside, image_folder, tmp_path, "--overwrite", "true"))
    with pytest.raises(ValueError, match="would delete"):
        pipeline.run(SimCLIPTrainer, options, args)
    assert (tmp_path / "thesis.txt").is_file()


def tree(folder):
    """Everything that a folder holds, bit for bit."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def earlier(tmp_path):
    """What an earlier run left."""
    output = tmp_path / "out"
    (output / "checkpoint-2").mkdir(parents=True)
    for name in ("robustness.json", "model.safetensors", "checkpoint-2/optimizer.pt", "samples-a.jsonl", ".hidden"):
        (output / name).write_bytes(os.urandom(100))
    mark_complete(output / "checkpoint-2", {})
    return output


def end(error):
    def ended(*args, **settings):
        raise error

    return ended


class TestOverwrite:
    """Findings-reliability 1 and 15: an earlier run is there, bit for bit, until a new one has its results."""

    @pytest.fixture
    def overwrite(self, earlier, clip_folder, image_folder):
        def run(*more, name="out"):
            argv = words(clip_folder, image_folder, earlier.parent / name, "--overwrite", "true", *more)
            pipeline.run(SimCLIPTrainer, *pipeline.parse(SimCLIPTrainer, argv))

        return run

    @pytest.mark.parametrize(
        "wrong",
        [
            "--learning_rate nan", "--learning_rate -1", "--learning_rate inf", "--weight_decay nan", "--max_steps 0",
            "--per_device_train_batch_size 0", "--per_device_eval_batch_size 0", "--gradient_accumulation_steps 0",
            "--test_steps 0", "--test_queries -5 --test_protocol robustvlm", "--optim adamw_anyprecision",
            "--attack_step_size nan", "--eval_attack_steps 0", "--cpu_threads -1", "--test_eps nan", "--attack_steps 0",
            "--per_device_train_batch_size 13 --dataloader_drop_last true", "--lr_scheduler_type cosine_with_min_lr",
            "--templates {x}.txt", "--templates {.txt", "--train_split nowhere", "--dataset_name /nowhere",
            "--model_name_or_path /nowhere", "--class_names nowhere.txt", "--freeze_blocks 9",
        ],
    )  # fmt: skip
    def test_bad_input_costs_nothing(self, wrong, overwrite, earlier, tmp_path, monkeypatch):
        monkeypatch.setattr(SimCLIPTrainer, "train", lambda *a, **k: pytest.fail("training started"))
        monkeypatch.chdir(tmp_path)
        for line in ("{x}", "{"):
            (tmp_path / f"{line}.txt").write_text(f"a {{}} {line}")
        before = tree(tmp_path)
        with pytest.raises((ValueError, SystemExit)):
            overwrite(*wrong.split())
        assert tree(tmp_path) == before

    @pytest.mark.parametrize(
        ("where", "error"),
        [
            ("_measure", ValueError("x")), ("train", RuntimeError("out of memory")), ("train", KeyboardInterrupt()),
            ("save_model", OSError(28, "No space left on device")), ("_write", ValueError("x")),
        ],
    )  # fmt: skip
    def test_a_run_that_fails_costs_nothing(self, where, error, overwrite, earlier, tmp_path, monkeypatch):
        before = tree(tmp_path)
        if where.startswith("_"):
            monkeypatch.setattr(harden, where, end(error))
        else:
            monkeypatch.setattr(SimCLIPTrainer, where, end(error))
        with pytest.raises(type(error)):
            overwrite()
        assert tree(tmp_path) == before

    def test_a_run_that_is_told_to_end_costs_nothing(self, overwrite, tmp_path, earlier, monkeypatch):
        """As a launcher tells the processes that are left, and a batch system the whole job."""
        before = tree(tmp_path)
        monkeypatch.setattr(SimCLIPTrainer, "train", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit, match="told to end"):
            overwrite()
        assert tree(tmp_path) == before
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def test_a_run_that_succeeds_leaves_itself_alone(self, overwrite, earlier, tmp_path):
        overwrite()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert not (earlier / "samples-a.jsonl").exists()
        assert len(load_results(earlier)) == 4

    def test_checkpoints_of_a_run_that_fails_late_are_not_lost_either(self, overwrite, earlier, tmp_path, capsys):
        """It may go on from them; the earlier run is beside it."""
        before = tree(earlier)
        saves = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3", "--on_collapse", "stop")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SimCLIPTrainer, "save_model", lambda self, *a, **k: end_at(self, 2) or SAVE(self, *a, **k))
            with pytest.raises(RuntimeError):
                overwrite(*saves)
        assert complete_checkpoint(earlier) == str(earlier / "checkpoint-1")
        assert tree(tmp_path / "out.old-1") == before
        assert f"{tmp_path / 'out.old-1'} the earlier run" in capsys.readouterr().err

    def test_what_a_killed_run_left_aside_is_kept_and_said(self, overwrite, earlier, tmp_path, capsys):
        (tmp_path / "out.old-1").mkdir()
        (tmp_path / "out.old-1" / "precious").write_text("precious")
        overwrite()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.old-1"]
        assert f"{tmp_path / 'out.old-1'} holds an earlier run" in capsys.readouterr().err

    def test_a_folder_that_is_a_link(self, overwrite, earlier, tmp_path):
        (tmp_path / "link").symlink_to(earlier)
        overwrite(name="link")
        assert (tmp_path / "link").is_symlink()
        assert len(load_results(earlier)) == 4
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]

    @pytest.mark.parametrize("again", [False, True], ids=["gone", "another"])
    def test_a_folder_that_is_deleted_meanwhile_is_an_error(self, again, overwrite, earlier, tmp_path, monkeypatch):
        def lost(trainer, *args, **settings):
            shutil.rmtree(earlier)
            if again:
                earlier.mkdir()
            return TRAIN(trainer, *args, **settings)

        before = tree(tmp_path)
        monkeypatch.setattr(SimCLIPTrainer, "train", lost)
        with pytest.raises(ValueError, match="was deleted while the run went on"):
            overwrite()
        assert tree(tmp_path) == before

    def test_a_samples_file_that_is_deleted_meanwhile_is_an_error(self, overwrite, earlier, monkeypatch):
        def lost(trainer, *args, **settings):
            next(earlier.glob("samples-before-*.jsonl")).unlink()
            return TRAIN(trainer, *args, **settings)

        monkeypatch.setattr(SimCLIPTrainer, "train", lost)
        with pytest.raises(ValueError, match=r"samples-before-.*was deleted while the run went on"):
            overwrite()

    @pytest.mark.parametrize("failing", [0, 1])
    def test_two_processes_of_which_one_fails(self, failing, earlier, clip_folder, image_folder, tmp_path):
        before = tree(earlier)
        argv = words(clip_folder, image_folder, earlier, "--overwrite", "true")
        port = free_port()
        ranks = [CONTEXT.Process(target=fail_on, args=(rank, failing, port, argv), daemon=True) for rank in (0, 1)]
        for process in ranks:
            process.start()
        ranks[failing].join(120)
        if failing == 1:
            ranks[0].terminate()  # as a launcher would
        ranks[0].join(120)
        ranks[1 - failing].kill()
        assert ranks[failing].exitcode == 1
        assert tree(earlier) == before
        assert not list(tmp_path.glob("out.old*"))


TRAIN, SAVE = SimCLIPTrainer.train, SimCLIPTrainer.save_model


def end_at(trainer, step):
    if trainer.state.global_step == step:
        raise RuntimeError("full")


def fail_on(rank, failing, port, argv):
    """One of two processes, of which one fails when it begins to train."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == failing:
        SimCLIPTrainer.train = end(RuntimeError("out of memory"))
    pipeline.run(SimCLIPTrainer, *pipeline.parse(SimCLIPTrainer, argv))


def test_an_output_that_is_a_file_is_said(clip_folder, image_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    for more in ((), ("--overwrite", "true"), ("--resume_from_checkpoint", "true")):
        argv = words(clip_folder, image_folder, tmp_path / "file", *more)
        with pytest.raises(ValueError, match="is a file; name a folder"):
            pipeline.run(SimCLIPTrainer, *pipeline.parse(SimCLIPTrainer, argv))


def test_a_checkpoint_that_can_not_be_gone_on_with_is_refused_before_hours_of_measuring(
    clip_folder, image_folder, tmp_path, monkeypatch
):
    argv = words(clip_folder, image_folder, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "1")
    pipeline.run(SimCLIPTrainer, *pipeline.parse(SimCLIPTrainer, argv))
    monkeypatch.setattr(harden, "_measure", lambda *a: pytest.fail("measured"))
    argv += ["--resume_from_checkpoint", "true"]
    with pytest.raises(ValueError, match="trained with --learning_rate 1e-05, and this run has --learning_rate 0.1"):
        pipeline.run(SimCLIPTrainer, *pipeline.parse(SimCLIPTrainer, [*argv, "--learning_rate", "0.1"]))
    (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer.pt is missing.*--resume_from_checkpoint .*checkpoint-1"):
        pipeline.run(SimCLIPTrainer, *pipeline.parse(SimCLIPTrainer, argv))


def test_sanity_checks_both_models_with_each_other(clip_folder, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rivals, "square", lambda objective, images, *_, **__: images)  # a thousand queries otherwise
    more = ("--sanity", "true", "--test_eps", "1/255", "--max_steps", "1")
    run_recipe(monkeypatch, words(clip_folder, image_folder, tmp_path / "out", *more))
    results = load_results(tmp_path / "out")
    for result in results:
        transfer = next(check for check in result.sanity["checks"] if check["name"] == "as strong as a transfer")
        assert transfer["verdict"] != "not run"
    said = capsys.readouterr().out
    assert "sanity checks, before on tiny-images" in said
    assert "sanity checks, after on tiny-images" in said
