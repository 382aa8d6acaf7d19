"""Runs that are killed, and go on to the same weights bit for bit."""

from __future__ import annotations

import json
import re
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.methods.tecoa import TeCoATrainer
from hf_robust_vision.methods.tima import TIMATrainer
from hf_robust_vision.training.checkpoints import MANIFEST, complete_checkpoint, mark_complete, rotate
from tests.conftest import build_clip, build_processor, make_dataset, picture
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
    settings |= {"ema_decay": 0.5, "clean_drift_bound": 1e-3} if fsdp else {}
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
    settings |= {"lr_scheduler_type": "constant"}  # which does not look at the end
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
        other = {"kind": TeCoATrainer, "lr_scheduler_type": "constant"} | steps
        make_trainer(clip_folder, tmp_path, **other).train(resume_from_checkpoint=True)
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
        mark_complete(tmp_path / f"checkpoint-{number}", {})
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
        mark_complete(tmp_path / f"checkpoint-{number}", {})
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-9")
    mark_complete(tmp_path / "checkpoint-10", {})  # by number, not by letters
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert complete_checkpoint(tmp_path / "checkpoint-2") == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-99-backup").mkdir()
    mark_complete(tmp_path / "checkpoint-99-backup", {})
    assert complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_nothing_to_resume_is_said(clip_folder, tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    trainer = make_trainer(clip_folder, tmp_path)
    for place in (True, str(tmp_path / "checkpoint-4")):
        with pytest.raises(ValueError, match="no complete checkpoint"):
            trainer.train(resume_from_checkpoint=place)


def relabelled(count=24):
    data = make_dataset(count)
    data.rows[-1] = data.rows[-1] | {"label": 0}
    return data


OTHERS = {
    "model": ({"clip": build_clip}, "--model_name_or_path"),
    "images": ({"train": lambda: make_dataset(24, start=1)}, "--dataset_name tiny"),
    "number of images": ({"train": lambda: make_dataset(25)}, "--dataset_name tiny (split train, 24 images, "),
    "labels": ({"train": relabelled}, "--dataset_name tiny"),
    "split": ({"train": lambda: make_dataset(24, "validation")}, "--dataset_name tiny (split train, "),
    "schedule": ({"lr_scheduler_type": "linear"}, "--lr_scheduler_type cosine"),
    "end of the schedule": ({"max_steps": 7}, "--max_steps 6"),
    "epochs for steps": ({"max_steps": -1, "num_train_epochs": 2}, "--max_steps 6"),
    "warm-up": ({"warmup_steps": 2}, "--warmup_steps 0"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "--gradient_accumulation_steps 1 in 1 processes"),
    "batch": ({"per_device_train_batch_size": 4}, "--per_device_train_batch_size 6"),
    "precision": ({"bf16": True}, "--bf16 false"),
    "optimizer": ({"optim": "sgd"}, "--optim adamw_torch"),
    "momentum": ({"adam_beta1": 0.8}, "--adam_beta1 0.9"),
    "seed": ({"seed": 1}, "--seed 0"),
}


@pytest.fixture(scope="module")
def six_steps(clip_folder, tmp_path_factory):
    """A finished run with checkpoints 2, 4 and 6, to be copied."""
    output = tmp_path_factory.mktemp("six") / "run"
    trainer = make_trainer(clip_folder, output, **RUN)
    trainer.train()
    return output, weights(trainer)


@pytest.fixture
def run(six_steps, tmp_path):
    return shutil.copytree(six_steps[0], tmp_path / "run")


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_would_make_it_another_run_is_refused(name, clip_folder, run, tmp_path):
    """Findings-reliability 5: named with the old value, the new one and what to type; and nothing is changed."""
    changes, typed = OTHERS[name]
    changes, folder = dict(changes), clip_folder
    if changes.pop("clip", None):
        folder = tmp_path / "other"
        build_clip(vision_init=4.0).save_pretrained(folder)
        build_processor().save_pretrained(folder)
    if "train" in changes:
        changes["train"] = changes["train"]()
    again = make_trainer(folder, run, **(RUN | changes))
    before = weights(again)
    for resume in (True, str(run / "checkpoint-2")):
        said = f"was trained with (.*){re.escape(typed)}(.*), and this run has (.*); go on with (.*), or start anew"
        with pytest.raises(ValueError, match=said):
            again.train(resume_from_checkpoint=resume)
    assert largest_gap(weights(again), before) == 0


def test_an_update_may_be_shared_out_in_another_way(clip_folder, run, six_steps):
    settings = RUN | {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    again = make_trainer(clip_folder, run, **settings)
    again.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert largest_gap(weights(again), six_steps[1]) < 1e-3  # two steps of at most 1e-3 in which Adam may round apart


def test_another_number_of_processes_may_go_on(clip_folder, run, six_steps):
    settings = RUN | {"per_device_train_batch_size": 3, "resume": str(run / "checkpoint-4")}
    assert start(clip_folder, run, world=2, **settings) == [0, 0], said(run)
    assert largest_gap(final(run), final(run, 1)) == 0
    assert largest_gap(final(run), six_steps[1]) < 1e-3
    settings |= {"per_device_train_batch_size": 6}
    assert 0 not in start(clip_folder, run, world=2, **settings)
    assert "--per_device_train_batch_size 6 --gradient_accumulation_steps 1 in 1 processes, and this run" in said(run)


def test_the_same_images_elsewhere_are_the_same(clip_folder, image_folder, tmp_path):
    """A job that is queued again copies them to a disk of its own, and all files are new."""
    transform, settings = make_dataset(3).transform, RUN | {"max_steps": 2}
    data = load_labelled_images(image_folder, "train", transform)
    make_trainer(clip_folder, tmp_path / "run", train=data, **settings).train()
    shutil.copytree(image_folder, tmp_path / "scratch", copy_function=shutil.copyfile)
    again = make_trainer(
        clip_folder, tmp_path / "run", train=load_labelled_images(tmp_path / "scratch", "train", transform), **settings
    )
    again.train(resume_from_checkpoint=True)
    first = next((tmp_path / "scratch" / "train" / "red").iterdir())
    picture(99, 0).save(first)
    other = load_labelled_images(tmp_path / "scratch", "train", transform)
    with pytest.raises(
        ValueError, match="trained with --dataset_name tiny-images .*this run has --dataset_name scratch"
    ):
        make_trainer(clip_folder, tmp_path / "run", train=other, **settings).train(resume_from_checkpoint=True)


def test_a_stream_may_not(clip_folder, tmp_path):
    """Its images would come in another order."""
    settings = RUN | {"train": make_stream(10), "per_device_train_batch_size": 2}
    make_trainer(clip_folder, tmp_path, **settings).train()
    other = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "train": make_stream(10)}
    with pytest.raises(ValueError, match="--per_device_train_batch_size 2 --gradient_accumulation_steps 1"):
        make_trainer(clip_folder, tmp_path, **(settings | other)).train(resume_from_checkpoint=True)


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json")


@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_it(name, harm, clip_folder, run, six_steps):
    """Findings-reliability 5 and 10: one flipped bit is enough, and nothing else is taken unasked."""
    file = run / "checkpoint-6" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content if harm == "flipped" else content[: len(content) // 2])
    if harm == "gone":
        file.unlink()
    said = f"{file} is {'missing' if harm == 'gone' else 'damaged'}"
    way = f"type --resume_from_checkpoint {run / 'checkpoint-4'}"
    again = make_trainer(clip_folder, run, **RUN)
    for resume in (True, str(run), str(run / "checkpoint-6")):
        with pytest.raises(ValueError, match=f"{re.escape(said)}.*{re.escape(way)}"):
            again.train(resume_from_checkpoint=resume)
    if name == FILES[0] and harm == "flipped":
        again.train(resume_from_checkpoint=str(run / "checkpoint-4"))
        assert largest_gap(weights(again), six_steps[1]) == 0


def test_the_one_before_is_whole_or_not_named(clip_folder, run):
    for number in (4, 6):
        (run / f"checkpoint-{number}" / "optimizer.pt").write_bytes(b"")
    again = make_trainer(clip_folder, run, **RUN)
    with pytest.raises(ValueError, match=re.escape(f"type --resume_from_checkpoint {run / 'checkpoint-2'}.")):
        again.train(resume_from_checkpoint=True)
    (run / "checkpoint-2" / "scheduler.pt").unlink()
    with pytest.raises(ValueError, match="checkpoint-6.optimizer.pt is damaged.*no earlier one is whole: start anew"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": [], "settings": {}}', "null", "\udcff"])
def test_a_checkpoint_without_a_manifest_is_refused(content, clip_folder, run):
    """Earlier versions left an empty file: such a checkpoint can not be told from a damaged one."""
    (run / "checkpoint-6" / MANIFEST).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"checkpoint-6/{MANIFEST} is no manifest.*earlier version.*checkpoint-4"):
        make_trainer(clip_folder, run, **RUN).train(resume_from_checkpoint=True)


def test_the_best_checkpoint_must_be_there_to_be_loaded_at_the_end(clip_folder, run):
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    state["best_model_checkpoint"] = str(run / "checkpoint-2")
    (run / "checkpoint-6" / "trainer_state.json").write_text(json.dumps(state))
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    again = make_trainer(clip_folder, run, **RUN, **best, metric_for_best_model="robust_accuracy")
    mark_complete(run / "checkpoint-6", again._settings())
    (run / "checkpoint-2" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"best checkpoint so far .*checkpoint-2/model.safetensors is missing"):
        again.train(resume_from_checkpoint=True)


def test_weights_alone_are_nothing_to_go_on_from(clip_folder, tmp_path):
    """The optimizer would start anew, and nothing would say so."""
    settings = RUN | {"save_only_model": True, "max_steps": 2}
    make_trainer(clip_folder, tmp_path, **settings).train()
    with pytest.raises(ValueError, match="checkpoint-2 holds no optimizer, as --save_only_model true"):
        make_trainer(clip_folder, tmp_path, **settings).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_weights_that_are_no_numbers_is_refused(clip_folder, run):
    """Findings-reliability 9: resumed from it, a run called it the last good one."""
    state = load_file(run / "checkpoint-6" / "model.safetensors")
    state["visual_projection.weight"][0] = torch.nan
    save_file(state, run / "checkpoint-6" / "model.safetensors", metadata={"format": "pt"})
    again = make_trainer(clip_folder, run, **RUN)
    mark_complete(run / "checkpoint-6", again._settings())
    with pytest.raises(ValueError, match=r"checkpoint-6 holds NaN or infinity in visual_projection.weight"):
        again.train(resume_from_checkpoint=True)
