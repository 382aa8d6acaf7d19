"""Frozen first blocks and layer-wise learning rates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hf_robust_vision import TIMATrainer, as_encoder
from hf_robust_vision.training import layers
from hf_robust_vision.training.layers import (
    freeze_first_blocks,
    layers_of,
    learning_rate_scales,
    train_layers,
    which_layers,
)
from tests.towers.zoo import tiny_vlm
from tests.training.helpers import SGD, make_trainer, weights


LORA = {"use_peft": True, "lora_r": 2}

PLACE = {  # of a tower of two blocks: how many steps of decay
    "vision_model.embeddings.class_embedding": 3,
    "vision_model.pre_layrnorm.weight": 3,
    "vision_model.encoder.layers.0.self_attn.q_proj.weight": 2,
    "vision_model.encoder.layers.1.mlp.fc2.bias": 1,
    "vision_model.post_layernorm.bias": 0,
    "visual_projection.weight": 0,
    "text_model.embeddings.token_embedding.weight": 3,
    "text_model.encoder.layers.0.layer_norm1.weight": 2,
    "text_model.final_layer_norm.weight": 0,
    "text_projection.weight": 0,
    "logit_scale": 0,
}


def test_scales_are_powers_of_the_decay(encoder):
    scales = learning_rate_scales(encoder, 0.5)
    assert {name: scales[name] for name in PLACE} == {name: 0.5**steps for name, steps in PLACE.items()}
    assert set(scales) == {name for name, _ in encoder.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"use_peft": True, "lora_r": 2}], ids=["full", "lora"])
def test_groups_of_the_optimizer(options, clip_folder, tmp_path):
    """Every parameter that trains once; its share of the rate; decay where `Trainer` decays."""
    settings = {"learning_rate": 0.1, "weight_decay": 0.3, "layer_decay": 0.5} | options
    trainer = make_trainer(clip_folder, tmp_path, kind=TIMATrainer, text_params="encoder", **settings)
    scales = learning_rate_scales(trainer.model, 0.5)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = []
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            seen.append(names[id(parameter)])
            assert group["lr"] == pytest.approx(0.1 * scales[seen[-1]])
            assert group["weight_decay"] == (0.3 if seen[-1] in decayed else 0.0)
    assert sorted(seen) == sorted(name for name, p in trainer.model.named_parameters() if p.requires_grad)
    assert any(name not in decayed for name in seen) or options


def test_updates_are_scaled(clip_folder, tmp_path):
    """One step of SGD: each weight moves by its share of what it moves without decay, whatever the schedule."""
    settings = SGD | {"double": True, "max_steps": 1, "learning_rate": 0.02, "warmup_steps": 0}
    moves = {}
    for decay in (1.0, 0.5):
        trainer = make_trainer(clip_folder, tmp_path, layer_decay=decay, **settings)
        before = weights(trainer)
        trainer.train()
        moves[decay] = {name: value - before[name] for name, value in weights(trainer).items()}
    for name, scale in learning_rate_scales(trainer.model, 0.5).items():
        torch.testing.assert_close(moves[0.5][name], scale * moves[1.0][name], rtol=1e-9, atol=1e-15)
    assert moves[1.0]["vision_model.encoder.layers.0.mlp.fc1.weight"].abs().max() > 1e-9


def test_the_schedule_keeps_the_shares(clip_folder, tmp_path):
    """And a resumed run has them, too."""
    settings = {"max_steps": 4, "layer_decay": 0.5, "lr_scheduler_type": "linear", "learning_rate": 1e-3}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(clip_folder, tmp_path, **settings)
    whole.train()
    again = make_trainer(clip_folder, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(again)[name])
    peaks = {group["initial_lr"] / 1e-3 for group in again.optimizer.param_groups}
    assert peaks == {0.5**steps for steps in range(4)}


@pytest.mark.parametrize("count", [1, 2])
def test_frozen_blocks_stay(count, clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, freeze_blocks=count, learning_rate=1e-2, weight_decay=0.1)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    frozen = ["vision_model.embeddings.", "vision_model.pre_layrnorm."]
    frozen += [f"vision_model.encoder.layers.{block}." for block in range(count)]
    vision = {name for name in before if name.startswith("vision_model.") or name == "visual_projection.weight"}
    assert moved == {name for name in vision if not name.startswith(tuple(frozen))}


INPUT = ("vision_model.embeddings.", "vision_model.pre_layrnorm.")
BLOCKS = ("vision_model.encoder.layers.0.", "vision_model.encoder.layers.1.")
OUTPUT = ("vision_model.post_layernorm.", "visual_projection.")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("text", "trains"),
    [("first", (*INPUT, BLOCKS[0])), ("first:2", (*INPUT, *BLOCKS)), ("last:1", (BLOCKS[1], *OUTPUT))],
)
def test_only_the_layers_asked_for_move(text, trains, lora, clip_folder, tmp_path):
    options = {"trainable_layers": text, "learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 2} | (
        LORA if lora else {}
    )
    trainer = make_trainer(clip_folder, tmp_path, **options)
    before = weights(trainer)
    trainer.train()
    moved = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    among = {name for name in before if name.startswith(trains)}
    if lora:  # on the linear layers alone, and B starts at zero as A does not
        assert moved == {name for name in among if ".lora_" in name}
        assert {name.split(".lora_")[0] for name in moved} >= {f"{BLOCKS[0 if text == 'first' else 1]}mlp.fc1"}
    else:
        assert moved == among - {"vision_model.embeddings.position_ids"}
    assert trainer.training_record()["trainable_layers"] == text


def test_last_layers_are_what_frozen_first_blocks_leave(clip_folder, tmp_path):
    trainers = [
        make_trainer(clip_folder, tmp_path, **how) for how in ({"freeze_blocks": 1}, {"trainable_layers": "last"})
    ]
    left = [{name for name, p in trainer.model.named_parameters() if p.requires_grad} for trainer in trainers]
    assert left[0] == left[1]


def test_a_text_tower_is_not_concerned(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, kind=TIMATrainer, trainable_layers="first")
    trains = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    texts = {
        name for name, _ in trainer.model.named_parameters() if name.startswith(("text_model.", "text_projection."))
    }
    assert texts <= trains
    assert all(name.startswith((*INPUT, BLOCKS[0])) for name in trains - texts)


def test_a_run_goes_on_with_the_layers_that_it_had(clip_folder, tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "trainable_layers": "first"}
    whole = make_trainer(clip_folder, tmp_path, **settings)
    whole.train()
    again = make_trainer(clip_folder, tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(whole).items())
    other = make_trainer(clip_folder, tmp_path, **settings | {"trainable_layers": "all"})
    with pytest.raises(
        ValueError, match="trained with --trainable_layers first, and this run has --trainable_layers all"
    ):
        other.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "text", ["", "none", "first:", "first:0", "last:-1", "last:x", "all:2", "middle:1", "first:1.5"]
)
def test_layers_that_are_none(text):
    with pytest.raises(ValueError, match="is none of all, first:N and last:N"):
        which_layers(text)


def test_frozen_blocks_with_gradient_checkpointing(clip_folder, tmp_path):
    settings = {"double": True, "freeze_blocks": 1, "learning_rate": 1e-2}
    plain, saving = (
        make_trainer(clip_folder, tmp_path / name, gradient_checkpointing=name == "saving", **settings)
        for name in ("plain", "saving")
    )
    plain.train()
    saving.train()
    for name, value in weights(plain).items():
        torch.testing.assert_close(value, weights(saving)[name], rtol=0, atol=1e-12)


def test_too_many_frozen_blocks(clip_folder, tmp_path):
    with pytest.raises(ValueError, match="freeze_blocks=3, but the vision tower has 2 blocks"):
        make_trainer(clip_folder, tmp_path, freeze_blocks=3)
    with pytest.raises(ValueError, match="freeze_blocks=1 leaves nothing to train"):
        make_trainer(clip_folder, tmp_path, freeze_blocks=1, feature="patch_tokens")
    with pytest.raises(ValueError, match="trainable_layers=first:3, but the vision tower has 2 blocks"):
        make_trainer(clip_folder, tmp_path, trainable_layers="first:3")
    with pytest.raises(ValueError, match="trainable_layers=last leaves nothing to train"):
        make_trainer(clip_folder, tmp_path, trainable_layers="last", feature="patch_tokens")


@pytest.mark.parametrize(
    ("family", "inputs", "blocks", "after"),
    [
        ("llava", ("embeddings.", "pre_layrnorm."), "encoder.layers.", "post_layernorm."),
        ("qwen2_5_vl", ("patch_embed.",), "blocks.", "merger."),
    ],
)
def test_layers_of_a_vlm(family, inputs, blocks, after):
    """A VLM's tower is found by its list of blocks, whatever their names are."""
    encoder = as_encoder(*tiny_vlm(family))
    start = next(name for name, module in encoder.named_modules() if module is encoder.tower) + "."
    scales = learning_rate_scales(encoder, 0.5)
    assert set(scales) == {name for name, _ in encoder.named_parameters()}
    for name, scale in scales.items():
        place, at = name.removeprefix(start), f"{start}{blocks}"
        steps = 4 if place.startswith(inputs) else 3 - int(name.removeprefix(at).split(".")[0]) if at in name else 0
        assert (name, scale) == (name, 0.5**steps)
    assert any(name.startswith(start + after) for name in scales)
    freeze_first_blocks(encoder, 1)
    frozen = {name for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, scale in scales.items() if scale <= 0.5**3}
    with pytest.raises(ValueError, match="freeze_blocks=4, but the vision tower has 3 blocks"):
        freeze_first_blocks(encoder, 4)
    encoder.requires_grad_(True)
    train_layers(encoder, "first:1")
    trains = {name for name, parameter in encoder.tower.named_parameters() if parameter.requires_grad}
    assert trains == {name.removeprefix(start) for name in frozen}


def test_a_tower_without_blocks_is_refused(encoder, clip_folder, tmp_path, monkeypatch):
    """Before the first step, and never ignored."""
    encoder.vision_model.encoder.layers = nn.Sequential(*encoder.vision_model.encoder.layers)
    for refused in (lambda: freeze_first_blocks(encoder, 1), lambda: learning_rate_scales(encoder, 0.5)):
        with pytest.raises(ValueError, match="no blocks can be told apart in a CLIPVision"):
            refused()
    monkeypatch.setattr(layers, "layers_of", lambda tower: layers_of(nn.Linear(1, 1)))
    for name, value in {"freeze_blocks": 1, "trainable_layers": "first", "layer_decay": 0.5}.items():
        with pytest.raises(ValueError, match="no blocks can be told apart in a Linear"):
            make_trainer(clip_folder, tmp_path, **{name: value})


def test_an_optimizer_of_ones_own_has_its_own_rates(clip_folder, tmp_path):
    own = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), None)
    with pytest.raises(ValueError, match="layer_decay=0.5 would not reach an optimizer of your own"):
        make_trainer(clip_folder, tmp_path, layer_decay=0.5, optimizers=own)
