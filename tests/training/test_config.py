"""Arguments: what is read, and what is refused with the line to type."""

from __future__ import annotations

import pytest
from transformers import HfArgumentParser

from hf_robust_vision.attacks import L2Ball, LinfBall
from hf_robust_vision.methods.sim_clip import SimCLIPArguments
from hf_robust_vision.training.config import Radius
from tests.training.helpers import arguments


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
        ({"eval_protocol": "strong"}, r"unknown eval_protocol 'strong'.*quick"),
        ({"on_collapse": "ignore"}, "'stop', 'record'"),
        ({"lora_r": 0}, "lora_r must be at least 1, got 0"),
        ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
        ({"layer_decay": 1.5}, "layer_decay must be above 0 and at most 1, got 1.5"),
        ({"freeze_blocks": -1}, "freeze_blocks must be at least 0"),
        ({"cache_targets_mb": -1}, "cache_targets_mb must be at least 0"),
        ({"matmul_precision": "low"}, "'highest', 'high', 'medium'"),
        ({"templates": "nope"}, "neither a file nor one of the templates"),
        ({"form": "siamese"}, "'anchored'.*'paper'"),
        ({"feature": "cls"}, "'pooled', 'patch_tokens', 'both'"),
        ({"attack_distance": "l2"}, "'cosine', 'squared_l2'"),
        ({"anchor_weight": -1}, "anchor_weight must be at least 0"),
        ({"form": "anchored", "anchor_weight": 0}, "--form paper"),
    ],
)
def test_refusals(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        arguments(tmp_path, **changes)


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
