"""The exponential average of the weights: what is measured and saved of a run that has one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, TrainerCallback

from hf_robust_vision.training.average import PREFIX
from hf_robust_vision.training.resume import MORE_STATE
from tests.training.helpers import SGD, largest_gap, make_trainer, weights


STEPS = SGD | {"double": True, "max_steps": 4, "learning_rate": 0.02}


class Watch(TrainerCallback):
    """The weights after each update."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: value.detach().clone() for name, value in model.named_parameters()})


def average(start, seen, decay):
    """Written out: each update's weights with the share that the later decays leave them."""
    decays = [min(decay, (1 + step) / (10 + step)) for step in range(1, len(seen) + 1)]
    shares = []
    for step, own in enumerate(decays):
        share = 1 - own
        for later in decays[step + 1 :]:
            share *= later
        shares.append(share)
    first = 1 - sum(shares)
    return {name: first * start[name] + sum(s * w[name] for s, w in zip(shares, seen)) for name in start}


@pytest.mark.parametrize("decay", [0.25, 0.999])
@pytest.mark.parametrize("options", [{}, {"use_peft": True, "lora_r": 2}], ids=["full", "lora"])
def test_the_saved_model_is_the_average(decay, options, clip_folder, tmp_path):
    """Of the run without one: that goes its way, and what comes out is the average of where it was."""
    watch = Watch()
    plain = make_trainer(clip_folder, tmp_path, callbacks=[watch], **STEPS, **options)
    start = {name: value.detach().clone() for name, value in plain.model.named_parameters()}
    plain.train()
    trainer = make_trainer(clip_folder, tmp_path, ema_decay=decay, **STEPS, **options)
    trainer.train()
    wanted, found = average(start, watch.seen, decay), dict(trainer.model.named_parameters())
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12)
    assert largest_gap(weights(trainer), weights(plain)) > 1e-6
    trainer.save_model(str(tmp_path / "model"))
    saved = CLIPModel.from_pretrained(tmp_path / "model", dtype=torch.float64).state_dict()
    assert largest_gap(saved, trainer.hardened_encoder().state_dict()) == 0
    assert trainer.training_record()["ema_decay"] == decay


@pytest.mark.parametrize("options", [{}, {"use_peft": True, "lora_r": 2}], ids=["full", "lora"])
def test_what_is_saved_of_an_interrupted_run_is_the_average(options, clip_folder, tmp_path):
    """As its record says; the weights that train stay where they were."""

    class Interrupt(Watch):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    watch = Interrupt()
    trainer = make_trainer(clip_folder, tmp_path, ema_decay=0.5, callbacks=[watch], **STEPS, **options)
    found = dict(trainer.model.named_parameters())
    start = {name: value.detach().clone() for name, value in found.items()}
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    assert trainer.training_record()["ema_decay"] == 0.5
    with torch.no_grad():
        assert largest_gap(found, watch.seen[1]) == 0
        for name, value in average(start, watch.seen, 0.5).items():
            found[name].copy_(value)
    saved = CLIPModel.from_pretrained(tmp_path / "model", dtype=torch.float64).state_dict()
    assert largest_gap(saved, trainer.hardened_encoder().state_dict()) < 1e-12


def test_evaluations_are_of_the_average_and_training_goes_on(clip_folder, tmp_path, monkeypatch):
    measured = []
    watch = Watch()
    settings = STEPS | {"eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(clip_folder, tmp_path, ema_decay=0.25, callbacks=[watch], **settings)
    start = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    bank = trainer.text_bank

    def text_bank(dataset, encoder=None):
        measured.append({name: value.detach().clone() for name, value in encoder.named_parameters()})
        return bank(dataset, encoder)

    trainer.text_bank = text_bank
    trainer.train()
    trainer.evaluate()
    assert len(measured) == 5
    for step, found in enumerate([*measured, measured[-1]][:4], 1):
        assert largest_gap(found, average(start, watch.seen[:step], 0.25)) < 1e-12
    assert largest_gap(measured[4], measured[3]) == 0  # at the end it is the same that was measured last
    plain = make_trainer(clip_folder, tmp_path, callbacks=[other := Watch()], **STEPS)
    plain.train()
    assert all(largest_gap(one, two) == 0 for one, two in zip(watch.seen, other.seen, strict=True))


@pytest.mark.parametrize("options", [{}, {"use_peft": True, "lora_r": 2}], ids=["full", "lora"])
def test_a_resumed_run_is_the_unbroken_one(options, clip_folder, tmp_path):
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "ema_decay": 0.5,
        "learning_rate": 1e-3,
    } | options
    whole = make_trainer(clip_folder, tmp_path, **settings)
    whole.train()
    for place in (str(tmp_path / "checkpoint-2"), True):  # the other is over already
        again = make_trainer(clip_folder, tmp_path, **settings)
        again.train(resume_from_checkpoint=place)
        assert largest_gap(weights(again), weights(whole)) == 0
    held = load_file(tmp_path / "checkpoint-4" / MORE_STATE)
    trained = {name for name, value in whole.model.named_parameters() if value.requires_grad}
    assert set(held) == {f"{PREFIX}{name}" for name in trained}
    with pytest.raises(ValueError, match=r"trained with --ema_decay 0.5, and this run has --ema_decay 0.9"):
        make_trainer(clip_folder, tmp_path, **settings | {"ema_decay": 0.9}).train(resume_from_checkpoint=True)


def test_the_best_average_is_loaded_at_the_end(clip_folder, tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5, "learning_rate": 1e-3}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "greater_is_better": False}
    trainer = make_trainer(clip_folder, tmp_path, metric_for_best_model="distance", **settings)
    evaluate = trainer.evaluate
    trainer.evaluate = lambda *args, **more: evaluate(*args, **more) | {"eval_distance": trainer.state.global_step}
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best = load_file(f"{trainer.state.best_model_checkpoint}/{MORE_STATE}")
    found = dict(trainer.model.named_parameters())
    assert all(torch.equal(found[name.removeprefix(PREFIX)], value) for name, value in best.items())


def test_a_second_run_begins_anew(clip_folder, tmp_path):
    trainer = make_trainer(clip_folder, tmp_path, ema_decay=0.9, **STEPS)
    trainer.train()
    first = weights(trainer)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    start = {name: value for name, value in first.items() if name in watch.seen[0]}
    found = dict(trainer.model.named_parameters())
    with torch.no_grad():
        assert largest_gap(found, average(start, watch.seen, 0.9)) < 1e-12
