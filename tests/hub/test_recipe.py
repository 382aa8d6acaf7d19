"""`--push_to_hub` of a recipe: one push, at the end, of what was measured."""

from __future__ import annotations

import shlex
from hashlib import sha256

import pytest

from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.training import publishing
from tests.hub import client as remote
from tests.hub.server import Fault, Repo
from tests.launcher import TWO, launch, outcome, recipe
from tests.pipeline.test_harden import words
from tests.training.helpers import arguments, make_trainer


SAVES = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2")


def test_pushed_once_and_measured(hub, client, clip_folder, image_folder, tmp_path):
    """The first push breaks: nothing of the run is lost, and the command in the error brings it to the hub."""
    output = tmp_path / "tiny-robust"
    hub.faults.append(Fault("POST", "/commit/"))
    more = (*SAVES, "--push_to_hub", "true", "--hub_model_id", "me/tiny-robust", "--hub_private_repo", "true")
    said, error = client(remote.recipe, words(clip_folder, image_folder, output, *more))
    assert error.startswith(f"the push of {output} to me/tiny-robust did not go through: ")
    assert "measured in: before" in said
    assert hub.count("POST", "/commit/") == hub.count("POST", "/api/repos/create") == 1
    assert hub.repos["me/tiny-robust"].messages == ["initial commit"], "no draft of a card, no unfinished weights"
    assert (output / "checkpoint-2" / "optimizer.pt").is_file()
    again = shlex.split(error.rsplit("To repeat it: ", 1)[1])
    status, said = client(remote.command, *again[1:], "--verify", "--dataset", image_folder)
    assert status == 0, said
    assert "6 samples measured again, 18 outcomes: all as recorded" in said
    arrived = hub.files("me/tiny-robust")
    assert hub.repos["me/tiny-robust"].private
    assert not [name for name in arrived if "checkpoint" in name or "training_args" in name or "optimizer" in name]
    card = arrived["README.md"].decode()
    assert str(tmp_path) not in card
    assert str(clip_folder.parent) not in card
    assert "base_model:" not in card.split("---")[1], "a folder of this machine is nobody's original"
    loaded = client(remote.load, "me/tiny-robust")
    assert loaded["before"] + loaded["results"] == load_results(output)
    assert loaded["training"]["steps"] == 2


def test_pushed_and_verified_at_the_end(hub, client, clip_folder, image_folder, tmp_path):
    output = tmp_path / "tiny-robust"  # named by the folder, owned by the token's user
    said, error = client(remote.recipe, words(clip_folder, image_folder, output, "--push_to_hub", "true"))
    assert error is None, error
    assert "pushed the model to me/tiny-robust: " in said
    assert "downloaded again: 6 samples measured again, 18 outcomes: all as recorded" in said


@pytest.mark.slow
def test_two_processes_push_once(hub, hub_settings, clip_folder, image_folder, tmp_path):
    """The first process measures the download again by itself: the others are gone by then, and wait for nothing."""
    output = tmp_path / "tiny-robust"
    words = recipe("sim_clip", clip_folder, image_folder, output, "--push_to_hub", "true")
    status, said, wrong = outcome(launch(*TWO, *words, **hub_settings))
    assert status == 0, wrong
    assert "processes: 2 (MULTI_CPU)" in said
    assert hub.count("POST", "/commit/") == 1
    assert said.count("pushed the model to me/tiny-robust: ") == 1
    assert "downloaded again: 5 samples measured again, 10 outcomes: all as recorded" in said


def test_lora_as_merged_model_and_as_adapter(hub, client, clip_folder, image_folder, tmp_path):
    output = tmp_path / "lora"
    said, error = client(remote.recipe, words(clip_folder, image_folder, output, "--use_peft", "true"))
    assert error is None, error
    data = ("--verify", "--dataset", image_folder)
    status, said = client(remote.command, "push", output, "me/merged", *data)
    assert status == 0, said
    assert "all as recorded" in said
    assert not [name for name in hub.files("me/merged") if "adapter" in name]
    hub.repos["me/base"] = Repo(refs={"main": "original"})
    hub.repos["me/base"].commits["original"] = {
        path.name: (path.read_bytes(), path.suffix == ".safetensors") for path in clip_folder.iterdir()
    }
    hub.objects.update({sha256(f).hexdigest(): f for f, _ in hub.repos["me/base"].commits["original"].values()})
    status, said = client(
        remote.command, "push", output, "me/lora", "--what", "adapter", "--base_model", "me/base", *data
    )
    assert status == 0, said
    assert "pushed the adapter to me/lora" in said
    assert "all as recorded" in said
    assert "model.safetensors" not in hub.files("me/lora")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ((), "HF_HUB_OFFLINE is set"),
        (("--hub_model_id", "a/b/c"), "wanted owner/name"),
        (("--hub_strategy", "checkpoint"), "type --hub_strategy end"),
        (("--measure", "false"), "leave --measure false out"),
    ],
    ids=["offline", "id", "strategy", "measure"],
)
def test_refused_before_training(more, said, clip_folder, image_folder, tmp_path, monkeypatch):
    if "--measure" in more:
        monkeypatch.setattr(publishing, "check_target", lambda *args: None)
    argv = words(clip_folder, image_folder, tmp_path / "out", "--push_to_hub", "true", *more)
    _, error = remote.recipe(argv)
    assert said in error
    assert not (tmp_path / "out").exists()


def test_a_trainer_pushes_only_what_was_measured(clip_folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        make_trainer(clip_folder, tmp_path / "early", push_to_hub=True)
    monkeypatch.setattr(publishing, "check_target", lambda *args: None)
    trainer = make_trainer(
        clip_folder, tmp_path / "out", push_to_hub=True, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer.train()  # saves a checkpoint, and would fail if it tried to push it
    trainer.save_model()
    monkeypatch.undo()
    monkeypatch.setattr("hf_robust_vision.hub.push.check_target", lambda *args: None)
    with pytest.raises(ValueError, match="measure the model first"):
        trainer.push_to_hub()
    with pytest.raises(ValueError, match="leave blocking out"):
        trainer.push_to_hub(blocking=False)
    assert arguments(tmp_path / "named").run_name == "named"
