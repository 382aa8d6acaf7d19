"""Wrong command lines: one line on the error stream, an exit status, no traceback, and nothing on disk changes.

findings-reliability 2, 8, 11 and 16, findings-journey 5 and 8.
"""

from __future__ import annotations

import re
import shlex

import pytest
import torch

from hf_robust_vision.cli import main
from hf_robust_vision.cli.harden import METHODS


NO_COUNTS = ("-1", "x", "2.5", "''", "1e3", "nan")
MODEL = "evaluate {clip} --dataset {data} --output_dir out"
RUN = "harden sim-clip --model_name_or_path {clip} --dataset_name {data} --output_dir new --use_cpu true --max_steps 1"
RUN += " --validation_split validation"

USAGE = [
    "", "nope", "--nope", "evaluate", "harden", "report", "remeasure", "remeasure demo-clip", "convert", "export", "push",
    "push folder", "convert x.pt", "convert x.pt --base b", "convert x.pt --output o", "interpolate", "interpolate a b", "interpolate a b --weight x --output_dir o", "export m", "export m --to v4",
    "export m --output o", "export m --to v5 --output o", "evaluate a b", "report x --nope", "harden sim_clip",
    "harden SIM-CLIP", "harden nope", "harden --max_steps 2", "harden sim-clip extra", "harden sim-clip --nope 1",
    "harden sim-clip --config", "harden sim-clip --max_step 2", "push f me/x --what all", "push f me/x --dry-run",
    "remeasure m r --dtype float16", "remeasure m r extra", "evaluate m --norm l3", "evaluate m --norm",
    "evaluate m --dtype float16", "evaluate m --step 3", "evaluate m --eps", "evaluate m --sanity yes",
    "evaluate m --dataset", "evaluate m --output_dir", "evaluate m --nope", "evaluate m --Steps 3", "evaluate -m x",
    "doctor x", "doctor --nope", "doctor --json yes", "swap", "swap v",
    "swap v t", "swap v t --output_dir", "swap v t --output_dir o --resize crop", "swap v t --output_dir o --num_attention_heads 0",
    "swap v t --output o", "swap v t extra --output_dir o",
    "compare", "compare --eps 4/255", "compare a b --eps", "compare a b --norm l3", "compare a b --save_examples -1",
    "load-check", "load-check a b", "load-check m --resolution 0", "load-check m --output_dir o", "load-check m --json x",
    "attack", "attack a b", "attack m --eps 4/255 8/255", "attack m --eps", "attack m --norm l3", "attack m --save_adversarial",
    "attack m --steps 0", "attack m --max_samples 0", "attack m --dtype float16", "attack m --output o",
    "evaluate-vlm", "evaluate-vlm a b", "evaluate-vlm m --algorithm fgsm", "evaluate-vlm m --norm l3", "evaluate-vlm m --eps",
    "evaluate-vlm m --question q.csv", "evaluate-vlm m --dtype float16",
    *(
        f"evaluate-vlm m --{flag} {value}"
        for flag in ("max_samples", "steps", "restarts", "batch_size")
        for value in ("0", "x")
    ),
    *(
        f"evaluate m --{flag} {value}"
        for flag in ("max_samples", "steps", "restarts", "queries", "batch_size", "resolution", "samples")
        for value in ("0", *NO_COUNTS)
    ),
    *(f"evaluate m --{flag} {value}" for flag in ("seed", "save_examples") for value in NO_COUNTS),
    *(f"report r --examples {value}" for value in NO_COUNTS),
    *(f"push f me/x --verify_samples {value}" for value in ("0", *NO_COUNTS)),
    *(f"convert x.pt --base b --output o --num_attention_heads {value}" for value in ("0", "x")),
    *(
        f"harden {method} --{flag} {value}"
        for method in METHODS
        for flag, value in (("max_steps", "2.5"), ("test_eps", "four"), ("overwrite", "maybe"), ("learning_rate", "x"))
    ),
]  # fmt: skip

DEVICES = ["bogus", "cuda:99", "cpu:x", "''", *([] if torch.cuda.is_available() else ["cuda"])]

EVALUATE = [
    *(
        f"--eps {eps}"
        for eps in (
            "4", "four", "4/0", "nan", "inf", "-1/255", "1e999", "''", "4/255 4/255", "1/255 4/1020", "/255", "4/", "1/2/3",
            "4/255,8/255", "0 256/255",
        )
    ),
    "--norm l2 --eps inf", "--norm l2 --eps -1", "--protocol nope", "--protocol ''", "--protocol Robustvlm", "--queries 5",
    "--steps 0 --queries 0", "--protocol quick --queries 5", "--resolution 100000", "--resolution -5", "--split nope",
    "--split ''", "--image_column nope", "--label_column nope", "--label_column image", "--class_names nope.txt",
    "--class_names {out}", "--templates nope", "--templates nope.txt", "--surrogate demo-clip", "--samples 5",
    "--sanity --surrogate {out}/nope", "--dataset {out}", "--dataset nope", "--dataset {out}/precious.txt",
    "--output_dir {out}/precious.txt", "--output_dir {out}/precious.txt/in", "--output_dir {broken}",
    *(f"--device {device}" for device in DEVICES),
]  # fmt: skip

HARDEN = [
    "--attack_eps 4", "--attack_eps nan", "--attack_eps 0", "--attack_eps -1/255", "--attack_norm l3", "--attack_steps 0",
    "--attack_step_size inf", "--attack_step_size 0", "--test_eps 4", "--test_eps 4/255 4/255", "--test_eps nan",
    "--test_protocol nope", "--test_steps 0", "--test_steps -3", "--test_restarts 0", "--test_queries 5",
    "--test_protocol autoattack --test_queries 0", "--eval_protocol nope", "--eval_eps 4", "--templates nope",
    "--on_collapse go", "--cpu_threads -1", "--max_test_samples -1", "--max_validation_samples 0", "--validation_size 0",
    "--lora_r 0", "--layer_decay 0", "--trainable_layers middle", "--trainable_layers first:9", "--freeze_blocks -1", "--matmul_precision low", "--fp16 true", "--form nope",
    "--feature nope", "--per_device_train_batch_size 0", "--gradient_accumulation_steps 0",
    "--learning_rate nan", "--learning_rate -1", "--config nope.yaml", "--config {out}", "--resume_from_checkpoint nope",
    "--resume_from_checkpoint true", "--class_names nope.txt", "--test_split train", "--test_split nope",
    "--model_name_or_path nope", "--dataset_name nope", "--streaming maybe", "--image_column nope", "--overwrite true "
    "--output_dir {out}", "--output_dir {out}", "--output_dir {out}/precious.txt", "--optim nope", "--lr_scheduler_type nope",
    "--push_to_hub true --measure false",
]  # fmt: skip

YAML = [
    "", "- a", "a", "max_steps: [", "max_steps: 1\nmax_steps: 2", "max_steps: true", "max_steps: 2.5", "max_steps: {a: 1}",
    "max_steps: [1, 2]", "max_steps: null", "max_steps: many", "nope: 1", "1: 2", "overwrite: 7", "overwrite: [true]",
    "test_eps: []", "test_eps: [[4/255]]", "test_eps: {a: 4/255}", "test_eps: true", "test_eps: four", "templates: true",
    "eval_strategy: no", "eval_strategy: never", "learning_rate: true", "learning_rate: much", "output_dir: [a]",
    "max_steps: !!python/object/apply:os.getcwd []", "max_steps: !mine 3", "a: &x [*x]", "\tmax_steps: 1", "{" * 3000,
    "test_restarts: 1.5", "sanity: 'perhaps'", "max_steps: 2020-01-01", "? [a, b]\n: 1",
]  # fmt: skip

OTHERS = [
    "report nope", "report {out}", "report {out}/precious.txt", "report name={out}", "report {broken}",
    "remeasure demo-clip nope", "remeasure demo-clip {out}", "remeasure demo-clip {broken}",
    "convert nope.pt --base {clip} --output new", "convert {out} --base {clip} --output new",
    "convert {out}/precious.txt --base {clip} --output new", "convert {out}/pickled.pt --base {clip} --output new",
    "convert {clip}/model.safetensors --base nope --output new",
    "convert {clip}/model.safetensors --base {clip} --output new --hidden_act relu",
    "export nope --to v4 --output new", "export {out} --to v4 --output new", "export nope --to open_clip --output new.pt",
    "interpolate {clip} nope --weight 0.5 --output_dir new", "interpolate {clip} {out} --weight 0.5 --output_dir new",
    "interpolate {clip} {clip} --weight 1.5 --output_dir new", "interpolate {clip} {clip} --weight nan --output_dir new",
    "interpolate {clip} {clip} --weight 0.5 --output_dir {out}",
    "interpolate {clip} {clip} --weight 0.5 --output_dir {out}/precious.txt",
    "swap nope {clip} --output_dir new", "swap ./nope {clip} --output_dir new", "swap demo-llava nope --output_dir new",
    "swap demo-llava {clip} --output_dir new", "swap demo-llava {out} --output_dir new", "swap {out} {clip} --output_dir new",
    "swap demo-llava demo-clip --output_dir {out}", "swap demo-llava demo-clip --output_dir {out}/precious.txt",
    "swap demo-llava demo-clip --output_dir {out}/precious.txt/in", "swap demo-llava {out}/pickled.pt --output_dir new",
    "swap demo-llava demo-clip --output_dir new --towers nope", "swap demo-llava demo-smolvlm --output_dir new",
    "swap demo-llava demo-clip --output_dir new --hidden_act nope",
    "compare {clip} nope --dataset {data}", "compare {clip} ./nope --dataset {data}", "compare {clip} {out} --dataset {data}",
    "compare {clip} {clip} --dataset {data}", "compare a={clip} a=demo-clip --dataset {data}",
    "compare {clip} b={clip} --dataset {data} --eps 4", "compare {clip} b={clip} --dataset nope",
    "compare {clip} b={clip} --dataset {data} --output_dir {broken}",
    "load-check nope", "load-check ./nope", "load-check {out}", "load-check {out}/precious.txt", "load-check ''",
    "load-check {clip}/model.safetensors",
    "attack nope --dataset {data}", "attack {out} --dataset {data}", "attack {clip} --dataset nope", "attack demo-llava",
    "attack {clip} --dataset {data} --eps 4", "attack {clip} --dataset {data} --eps four",
    "attack {clip} --dataset {data} --protocol nope", "attack {clip} --dataset {data} --split nope",
    "attack {clip} --dataset {data} --device bogus", "attack {clip} --dataset {data} --output_dir {out}/precious.txt",
    "attack {clip} --dataset {data} --output_dir {broken}",
    "evaluate-vlm nope", "evaluate-vlm {out}", "evaluate-vlm {clip}", "evaluate-vlm demo-clip", "evaluate-vlm ./nope",
    "evaluate-vlm demo-llava --eps 4", "evaluate-vlm demo-llava --eps four", "evaluate-vlm demo-llava --eps 4/255 4/255",
    "evaluate-vlm demo-llava --questions nope.csv", "evaluate-vlm demo-llava --questions {out}/precious.txt",
    "evaluate-vlm demo-llava --captions nope.jsonl", "evaluate-vlm demo-llava --questions a.csv --captions b.csv",
    "evaluate-vlm demo-llava --questions a.csv --prompt what", "evaluate-vlm demo-llava --device bogus",
    "evaluate-vlm demo-llava --output_dir {out}/precious.txt", "evaluate-vlm demo-llava --output_dir {broken}",
    "push nope me/x --dry_run", "push {out} me/x --dry_run", "push {out}/precious.txt me/x --dry_run",
    "push {clip} me/x --dry_run", "push {clip} a/b/c --dry_run", "push {clip} '' --dry_run", "push {clip} 'a b' --dry_run",
    "push {clip} me/x --device bogus", "push {clip} me/x --create_pr --revision dev", "push {broken} me/x --dry_run",
    "evaluate nope --dataset {data}", "evaluate {out} --dataset {data}", "evaluate {out}/precious.txt --dataset {data}",
    "evaluate {clip}/model.safetensors --dataset {data}", "evaluate ./nope", "evaluate ''",
]  # fmt: skip


class Pickled:
    def __reduce__(self):
        return (open, ("ran.txt", "w"))


@pytest.fixture(scope="module")
def places(clip_folder, image_folder, tmp_path_factory):
    here = tmp_path_factory.mktemp("lines")
    for name in ("out", "broken"):
        (here / name).mkdir()
    (here / "out" / "precious.txt").write_text("years of work")
    (here / "broken" / "robustness.json").write_text('{"schema": 1, "results": [')
    torch.save(Pickled(), here / "out" / "pickled.pt")
    return here, {"clip": clip_folder, "data": image_folder, "out": here / "out", "broken": here / "broken"}


@pytest.fixture
def refused(places, monkeypatch, capfd):
    here, names = places

    def check(line, status=(1,)):
        monkeypatch.chdir(here)
        before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
        capfd.readouterr()
        code = main(shlex.split(line.format(**names)))
        lines = re.split(r"[\r\n]+", capfd.readouterr().err)
        said = "\n".join(line for line in lines if line and "it/s]" not in line and "s/it]" not in line)
        assert code in status, said
        assert said.startswith("error: "), said
        assert len(said.splitlines()) == 1, said
        assert "Traceback" not in said
        assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before
        return said

    return check


def about(words, said):
    """The line says which word it is about, not something else that is wrong, too."""
    names = [part for word in words.split() for part in (word, *re.split(r"[-_/{}]", word)) if len(part) > 1]
    assert any(name.strip("'") in said for name in names), said


def test_there_are_enough():
    assert len(USAGE) + len(EVALUATE) + len(HARDEN) + len(YAML) + len(OTHERS) >= 200


@pytest.mark.parametrize("line", USAGE)
def test_usage(refused, line):
    assert "--help" in refused(line, (2,))


@pytest.mark.parametrize("words", EVALUATE)
def test_evaluate(refused, words):
    about(words, refused(f"{MODEL} {words}", (1, 2)))


@pytest.mark.parametrize("words", HARDEN)
def test_harden(refused, words):
    about(words, refused(f"{RUN} {words}", (1, 2)))


@pytest.mark.parametrize("text", YAML)
def test_yaml(refused, text, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    assert str(file) in refused(f"{RUN} --config {shlex.quote(str(file))}")


@pytest.mark.parametrize("line", OTHERS)
def test_others(refused, line):
    refused(line)
