"""Runs that are killed, and go on to the same weights bit for bit."""

from __future__ import annotations

import re
import signal

import pytest

from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.methods.tima import TIMATrainer
from hf_robust_vision.training.checkpoints import complete_checkpoint, mark_complete, rotate
from tests.training.helpers import largest_gap, make_stream, make_trainer, weights
from tests.training.ranks import final, said, start


RUN = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3, "feature": "both"}


@pytest.fixture(scope="module")
def unbroken(clip_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("unbroken")
    assert start(clip_folder, output, **RUN) == [0], said(output)
    return final(output)


@pytest.mark.parametrize(
    ("kill", "from_step", "left"),
    [({"kill": 5}, 4, {"checkpoint-2", "checkpoint-4"}), ({"kill_save": 4}, 2, {"checkpoint-2", "checkpoint-4"})],
    ids=["between-saves", "during-a-save"],
)
def test_killed_and_resumed_is_bit_equal(kill, from_step, left, clip_folder, unbroken, tmp_path):
    assert start(clip_folder, tmp_path, **RUN, **kill) == [-signal.SIGKILL], said(tmp_path)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == left
    assert complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{from_step}")
    assert start(clip_folder, tmp_path, resume=True, **RUN) == [0], said(tmp_path)
    assert largest_gap(final(tmp_path), unbroken) == 0
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")


@pytest.mark.parametrize(
    ("fsdp", "stream"), [(0, 0), (2, 0), (0, 10)], ids=["ddp", "fsdp2", "ddp-stream-in-its-third-pass"]
)
def test_one_of_two_processes_is_killed(fsdp, stream, clip_folder, tmp_path):
    """The other can not go on and ends with an error, as a launcher would end it; both start again from step 4."""
    settings = RUN | {"per_device_train_batch_size": 2, "fsdp": fsdp, "stream": stream, "world": 2}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(clip_folder, whole, **settings) == [0, 0], said(whole)
    codes = start(clip_folder, broken, kill=5, kill_rank=1, **settings)
    assert codes[0] not in (0, -signal.SIGKILL), "it hung, and was killed by `start`"
    assert codes[1] == -signal.SIGKILL
    assert complete_checkpoint(broken) == str(broken / "checkpoint-4")
    assert start(clip_folder, broken, resume=True, **settings) == [0, 0], said(broken)
    assert largest_gap(final(broken), final(whole)) == 0
    assert largest_gap(final(broken), final(broken, 1)) == 0


def test_a_stream_resumes_with_loader_workers(clip_folder, tmp_path):
    """Each worker reads a shard of its own; step 4 lies in the second pass."""
    settings = RUN | {"per_device_train_batch_size": 2, "dataloader_num_workers": 2, "save_steps": 4}
    whole, again = (make_trainer(clip_folder, tmp_path, train=make_stream(6), **settings) for _ in range(2))
    whole.train()
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert largest_gap(weights(again), weights(whole)) == 0


def test_resume_within_an_epoch_and_a_limit(clip_folder, tmp_path):
    """The same in one process: one checkpoint kept, 24 images in batches of 6, so step 5 is in the second epoch."""
    settings = RUN | {"save_steps": 5, "save_total_limit": 1, "max_steps": 7}
    whole = make_trainer(clip_folder, tmp_path / "whole", **settings)
    whole.train()
    assert [path.name for path in (tmp_path / "whole").glob("checkpoint-*")] == ["checkpoint-7"]
    stopped = make_trainer(clip_folder, tmp_path / "b", **(settings | {"save_total_limit": None}))
    stopped.train()
    again = make_trainer(clip_folder, tmp_path / "b", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-5"))
    assert largest_gap(weights(again), weights(whole)) == 0


@pytest.mark.parametrize("over", [False, True], ids=["stopped", "over"])
def test_other_settings_than_those_of_the_checkpoint_are_refused(over, clip_folder, tmp_path):
    """A record that says margin 0.2 of a run that had 0.1 until its second step would be wrong."""
    settings = {"kind": TIMATrainer, "max_steps": 2, "save_strategy": "steps", "save_steps": 2, "margin": 0.1}
    make_trainer(clip_folder, tmp_path, **settings).train()
    steps = {"max_steps": 2 if over else 3}
    for other, typed in (({"margin": 0.2}, "--margin 0.1"), ({"attack_eps": 0.5}, f"--attack_eps {1 / 255}")):
        trainer = make_trainer(clip_folder, tmp_path, **(settings | steps | other))
        before = weights(trainer)
        (name, new), message = next(iter(other.items())), f"trained with {typed}, and this run has "
        with pytest.raises(ValueError, match=re.escape(f"{message}--{name} {new}; go on with {typed}, or start anew")):
            trainer.train(resume_from_checkpoint=True)
        assert largest_gap(weights(trainer), before) == 0
    with pytest.raises(ValueError, match="trained with method TIMA, and this run has method TeCoA"):
        make_trainer(clip_folder, tmp_path, kind=TeCoATrainer, **steps).train(resume_from_checkpoint=True)
    free = {"save_steps": 1, "eval_attack_steps": 1, "logging_steps": 2}
    again = make_trainer(clip_folder, tmp_path, **(settings | steps | free))
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == steps["max_steps"]


def test_resuming_a_finished_run_takes_no_step(clip_folder, tmp_path):
    """Killed in the measurement after training; Trainer by itself would take a seventh step within the epoch."""
    settings = RUN | {"lr_scheduler_type": "constant", "max_steps": 7, "save_steps": 7}
    whole = make_trainer(clip_folder, tmp_path, **settings)
    whole.train()
    again = make_trainer(clip_folder, tmp_path, **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 7
    assert largest_gap(weights(again), weights(whole)) == 0


def test_a_checkpoint_that_is_written_again_is_not_complete_meanwhile(clip_folder, tmp_path, monkeypatch):
    trainer = make_trainer(clip_folder, tmp_path, **RUN)
    trainer.train()
    monkeypatch.setattr(trainer, "save_model", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer._save_checkpoint(trainer.model, None)
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_rotation_keeps_the_latest_and_the_best(tmp_path):
    for number in (2, 4, 6, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
        mark_complete(tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-8").mkdir()  # half-written: not counted, not touched
    rotate(tmp_path, 2, best=str(tmp_path / "checkpoint-2"))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-8", "checkpoint-10"}
    rotate(tmp_path, None, best=None)
    assert len(list(tmp_path.iterdir())) == 3


def test_which_checkpoint_is_complete(tmp_path):
    assert complete_checkpoint(tmp_path) is None
    for number in (2, 10, 9):
        (tmp_path / f"checkpoint-{number}").mkdir()
    assert complete_checkpoint(tmp_path) is None
    for number in (2, 9):
        mark_complete(tmp_path / f"checkpoint-{number}")
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    mark_complete(tmp_path / "checkpoint-10")  # by number, not by letters
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert complete_checkpoint(tmp_path / "checkpoint-2") == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-99-backup").mkdir()
    mark_complete(tmp_path / "checkpoint-99-backup")
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_nothing_to_resume_is_said(clip_folder, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    trainer = make_trainer(clip_folder, tmp_path)
    for place in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(ValueError, match="no complete checkpoint"):
            trainer.train(resume_from_checkpoint=place)
