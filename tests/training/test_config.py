"""Arguments: what is read, and what is refused with the line to type."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import HfArgumentParser

from hf_robust_vision.attacks import L2Ball, LinfBall
from hf_robust_vision.methods.sim_clip import SimCLIPArguments
from hf_robust_vision.methods.tima import TIMAArguments
from hf_robust_vision.processes import PATIENCE
from hf_robust_vision.training.config import Radius
from tests.training.helpers import SGD, arguments, largest_gap, make_trainer, weights


@pytest.mark.parametrize(
    ("text", "value"), [("4/255", 4 / 255), ("0.5", 0.5), (" 1 / 2 ", 0.5), (2, 2.0), ("1e-3", 1e-3)]
)
def test_radius(text, value):
    assert Radius(text) == value


@pytest.mark.parametrize("text", ["four", "4/0", "4/", "/255", "1/2/3", ""])
def test_no_radius(text):
    with pytest.raises(ValueError, match=r"fraction such as 4/255|could not convert"):
        Radius(text)


def test_fractions_from_the_command_line():
    words = "--output_dir x --attack_eps 4/255 --attack_step_size 1/255 --eval_eps 2/255 --use_cpu true"
    (args,) = HfArgumentParser(SimCLIPArguments).parse_args_into_dataclasses(words.split())
    assert (args.attack_eps, args.attack_step_size, args.eval_eps) == (4 / 255, 1 / 255, [2 / 255])
    assert args.attack_ball() == LinfBall(4 / 255)


def test_fractions_from_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("output_dir: x\nattack_eps: 4/255\nattack_step_size: 1/255\nuse_cpu: true\n")
    (args,) = HfArgumentParser(SimCLIPArguments).parse_yaml_file(str(tmp_path / "a.yaml"))
    assert (args.attack_eps, args.attack_step_size, args.eval_eps) == (4 / 255, 1 / 255, None)


def test_layers_of_an_adapter_from_the_command_line():
    words = "--output_dir x --use_cpu true --use_peft true --lora_target_modules q_proj v_proj"
    (args,) = HfArgumentParser(SimCLIPArguments).parse_args_into_dataclasses(words.split())
    assert (args.use_peft, args.lora_target_modules) == (True, ["q_proj", "v_proj"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attack_eps": 4}, r"--attack_eps=4/255"),
        ({"attack_eps": "4"}, r"--attack_eps=4/255"),
        ({"eval_eps": 8}, r"--eval_eps=8/255"),
        ({"attack_eps": 0}, "no attack"),
        ({"attack_eps": "0/255"}, "no attack"),
        ({"attack_eps": -0.1}, "at least 0"),
        ({"attack_eps": "nan"}, "finite"),
        ({"attack_norm": "l1"}, r"unknown norm 'l1'.*'linf', 'l2'"),
        ({"fp16": True}, "--bf16 true"),
        ({"attack_steps": 0}, "attack_steps must be at least 1"),
        ({"attack_step_size": 0}, "attack_step_size must be a finite number above 0"),
        ({"attack_step_size": "inf"}, "attack_step_size must be a finite number"),  # findings-reliability 8
        ({"attack_step_size": 8}, "attack_step_size=8/255"),  # findings-reliability 8
        ({"attack_step_size": "nan"}, "attack_step_size must be a finite number"),
        ({"attack_step_size": "inf", "attack_norm": "l2"}, "attack_step_size must be a finite number"),
        ({"eval_attack_steps": 0}, "eval_attack_steps must be at least 1"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan"),
        ({"learning_rate": float("inf")}, "learning_rate must be finite, got inf"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0, got -1"),
        ({"learning_rate": "1e-5"}, "learning_rate must be a number, got '1e-5'"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be finite"),
        ({"warmup_steps": float("nan")}, "warmup_steps must be finite"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"max_steps": 0}, "no update would be made.*--max_steps 1"),
        ({"max_steps": -1, "num_train_epochs": 0}, "no update would be made"),
        ({"max_steps": True}, "max_steps must be a whole number, got True"),
        ({"max_steps": 2.5}, "max_steps must be a whole number, got 2.5"),
        ({"max_steps": -7}, "max_steps must be at least -1"),
        ({"optim": "adam"}, "adam is not a valid OptimizerNames.*adamw_torch"),
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType.*cosine"),
        ({"eval_protocol": "strong"}, r"eval_protocol='strong' is not one of .*quick"),
        ({"on_collapse": "ignore"}, "'stop', 'record'"),
        ({"lora_r": 0}, "lora_r must be at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
        ({"layer_decay": 1.5}, "layer_decay must be above 0 and at most 1, got 1.5"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and below 1, got 1"),
        ({"ema_decay": float("nan")}, "ema_decay must be finite, got nan"),
        ({"ema_decay": None}, "ema_decay must be a number, got None"),
        ({"ema_decay": "0.9"}, "ema_decay must be a number, got '0.9'"),
        ({"layer_decay": None}, "layer_decay must be a number, got None"),
        ({"lora_dropout": None}, "lora_dropout must be a number, got None"),
        ({"learning_rate": None}, "learning_rate must be a number, got None"),
        ({"max_steps": None}, "max_steps must be a whole number, got None"),
        ({"anchor_weight": None}, "anchor_weight must be a number, got None"),
        ({"trainable_layers": None}, "trainable_layers=None is none of all, first:N and last:N"),
        ({"trainable_layers": 3}, "trainable_layers=3 is none of all, first:N and last:N"),
        ({"trainable_layers": "middle"}, "trainable_layers='middle' is none of all, first:N and last:N"),
        ({"freeze_blocks": -1}, "freeze_blocks must be at least 0"),
        ({"cache_targets_mb": -1}, "cache_targets_mb must be at least 0"),
        ({"matmul_precision": "low"}, "'highest', 'high', 'medium'"),
        ({"templates": "nope"}, "neither a file nor one of the templates"),
        ({"form": "siamese"}, "'anchored'.*'paper'"),
        ({"feature": "cls"}, "'pooled', 'patch_tokens', 'both'"),
        ({"attack_distance": "l2"}, "'cosine', 'squared_l2'"),
        ({"anchor_weight": -1}, "anchor_weight must be at least 0"),
        ({"anchor_weight": float("nan")}, "anchor_weight must be finite"),
        ({"form": "anchored", "anchor_weight": 0}, "--form paper"),
    ],
)
def test_refusals(changes, said, tmp_path):
    """Findings-reliability 1, 8 and 9, and what lies beside them."""
    with pytest.raises(ValueError, match=said):
        arguments(tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["margin", "eta", "mhe_weight", "iakd_weight", "takd_weight"])
def test_refusals_of_tima(name, tmp_path):
    for value, said in ((-1.0, "at least 0"), (float("nan"), "finite")):
        with pytest.raises(ValueError, match=f"{name} must be {said}"):
            arguments(tmp_path, TIMAArguments, **{name: value})


@pytest.mark.parametrize("line", ["a {x}", "a {", "a }", "a {} {x}", "a {{}}", "a {0}", "a {!r}", "a"])
def test_templates_that_format_would_stumble_over(line, tmp_path):
    """Findings-reliability 1 and 16."""
    (tmp_path / "t.txt").write_text(f"a photo of a {{}}\n{line}\n")
    with pytest.raises(ValueError, match=r't\.txt: a template needs one "\{\}" for the class name and no other brace'):
        arguments(tmp_path / "out", templates=str(tmp_path / "t.txt"))


def test_bf16_on_a_machine_without_an_accelerator(tmp_path, monkeypatch):
    """`use_cpu` need not be typed where there is nothing else (findings-journey 8)."""
    monkeypatch.setattr(getattr(torch, "accelerator", torch.cuda), "is_available", lambda: False)
    args = arguments(tmp_path, bf16=True, use_cpu=False)
    assert args.use_cpu
    assert args.device.type == "cpu"


def test_processes_wait_a_day(tmp_path):
    """Findings-code 5: the first one may check its numbers for hours. run_training.py looks at two processes."""
    assert arguments(tmp_path).ddp_timeout_delta == PATIENCE


def test_an_l2_radius_may_be_over_one(tmp_path):
    assert arguments(tmp_path, attack_norm="l2", attack_eps=3.0).attack_ball() == L2Ball(3.0)
    assert arguments(tmp_path, attack_norm="linf", attack_eps=1).attack_ball() == LinfBall(1.0)


def test_anchor_weight_is_free_where_it_is_not_used(tmp_path):
    assert arguments(tmp_path, form="frozen", anchor_weight=0).anchor_weight == 0


@pytest.mark.parametrize(("said", "read"), [("false", None), ("False", None), ("true", "true"), ("a/b", "a/b")])
def test_no_resume_may_be_said(said, read, tmp_path):
    assert arguments(tmp_path, resume_from_checkpoint=said).resume_from_checkpoint == read


def test_columns_are_kept_whatever_is_asked(tmp_path):
    assert arguments(tmp_path, remove_unused_columns=True).remove_unused_columns is False


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(SimCLIPArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"2 GPUs.*accelerate launch"):
        arguments(tmp_path)


@pytest.mark.parametrize(
    ("world", "wanted", "at_once", "made"),
    [(1, 64, 64, (64, 1)), (8, 64, 64, (8, 1)), (1, 64, 24, (16, 4)), (2, 128, 16, (16, 4)), (4, 512, 512, (128, 1))],
)
def test_a_global_batch_is_that_of_any_number_of_processes(world, wanted, at_once, made, monkeypatch):
    """findings-scale 3: eight processes made 512 of the paper's 64."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    args = SimpleNamespace(global_batch_size=wanted, per_device_train_batch_size=at_once)
    SimCLIPArguments._share_out(args)  # alone: the launcher would look for the other processes
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == made
    assert world * made[0] * made[1] == wanted


@pytest.mark.parametrize(
    ("world", "wanted", "at_once", "message"),
    [(3, 64, 8, "over 3 processes; start a number"), (1, 62, 20, r"62 images .* 31 x 2; type a --per_device")],
)
def test_a_global_batch_that_can_not_be_made_is_refused(world, wanted, at_once, message, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, global_batch_size=wanted, per_device_train_batch_size=at_once)


@pytest.mark.parametrize(("at_once", "parts"), [(6, 1), (3, 2), (4, 2)])
def test_parts_of_a_global_batch_are_the_whole(at_once, parts, clip_folder, tmp_path):
    settings = SGD | {"double": True, "max_steps": 1}
    whole = make_trainer(clip_folder, tmp_path, **settings)
    shared = make_trainer(clip_folder, tmp_path, global_batch_size=6, per_device_train_batch_size=at_once, **settings)
    assert shared.args.gradient_accumulation_steps == parts
    for trainer in (whole, shared):
        trainer.train()
    assert largest_gap(weights(whole), weights(shared)) < 1e-12
