"""The comparison of towers on a budget of nothing: what is trained, chosen, paired, resumed and written."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from towers_page import write_towers


ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "1", "--batch_size", "2", "--questions", "3", "--choice_questions", "2", "--attack_steps", "1"]
SMALL += ["--images", "2", "--zero_shot_steps", "1", "--seeds", "0,1", "--jobs", "1"]


@pytest.fixture(scope="module")
def recipe():
    pytest.importorskip("easy_vqa")
    return importlib.import_module("compare_towers")


@pytest.fixture(scope="module")
def measured(recipe, tmp_path_factory):
    """The original and two towers, hardened by one step."""
    root = tmp_path_factory.mktemp("towers")
    measuring = recipe.Measuring("validation", recipe.EPS, 3, 1, 1, 2, 1)
    rows = [recipe.Row(), recipe.Row("sim-clip", "pooled"), recipe.Row("sim-clip", "both")]
    trainings = [recipe.Training(row, 0, 1e-3 if row.method else 0.0, 1, 2) for row in rows]
    return root, measuring, {training: recipe.perform(training, measuring, root) for training in trainings}


def test_every_tower_is_swapped_in_and_measured(recipe, measured):
    root, measuring, done = measured
    hashes = set()
    for training, results in done.items():
        assert [(result.task, result.eps) for result in results] == [
            *(("vqa", eps) for eps in recipe.EPS),
            ("zero_shot", recipe.DEMO_EPS),
        ]
        assert {result.split for result in results} <= {"validation", "train"}
        (tower,) = json.loads((measuring.folder(training.folder(root)) / "swap_report.json").read_text())["towers"]
        assert (tower["changed"] > 0) == bool(training.row.method)
        hashes.add(tower["sha256_after"])
    assert len(hashes) == 3
    entries = recipe.summary(done)
    assert [entry["label"] for entry in entries] == ["original", "Sim-CLIP, `pooled`", "Sim-CLIP, `both`"]
    assert entries[0]["drift"] == [pytest.approx(1)]


def test_a_second_call_reads_back_and_another_setting_does_not(recipe, measured, monkeypatch):
    root, measuring, done = measured
    training, results = list(done.items())[-1]
    monkeypatch.setattr(recipe, "harden", None)
    assert recipe.perform(training, measuring, root) == results
    folders = {
        replace(training, **change).folder(root) for change in ({}, {"seed": 1}, {"learning_rate": 2e-3}, {"steps": 2})
    }
    assert len(folders) == 4
    tower = training.folder(root)
    assert measuring.folder(tower) != replace(measuring, attack_steps=2).folder(tower)


def test_a_tower_is_not_trained_again_for_another_measurement(recipe, measured, monkeypatch):
    root, _, done = measured
    training, results = list(done.items())[-1]
    monkeypatch.setattr(recipe.METHODS["sim-clip"][1], "train", None)
    assert recipe.harden(training, training.folder(root))["cpu_seconds"] == results[0].training["cpu_seconds"]


def test_the_rate_with_the_most_standing_answers_is_chosen(recipe, measured):
    _, _, done = measured
    (training, results), tried = list(done.items())[-1], {}
    for rate, share in ((1e-3, 0.2), (2e-3, 0.6), (4e-3, 0.4)):
        tried[replace(training, learning_rate=rate)] = [replace(r, robust_accuracy=share) for r in results]
    rates, seen = recipe.choose(tried)
    assert rates == {training.row: 2e-3}
    assert [entry["robust_accuracy"] for entry in seen] == [0.2, 0.6, 0.4]


def test_pairs_are_differences_of_the_same_questions(recipe, measured):
    root, measuring, done = measured
    rows = recipe.pairs(done, measuring, root)
    assert [row["eps"] for row in rows] == ["clean", "4/255", "8/255", "16/255"]
    assert {(row["one"], row["other"]) for row in rows} == {("Sim-CLIP, `both`", "Sim-CLIP, `pooled`")}
    _, pooled, both = done.values()
    assert rows[0]["difference"] == pytest.approx(both[0].clean_accuracy - pooled[0].clean_accuracy)
    for row, one, other in zip(rows[1:], both, pooled):
        assert row["difference"] == pytest.approx(one.robust_accuracy - other.robust_accuracy)
        assert row["low"] <= row["difference"] <= row["high"]


def test_the_page_says_what_the_numbers_say(tmp_path):
    row = {
        "label": "Sim-CLIP, `both`",
        "learning_rate": 2e-3,
        "answers_clean": [0.9, 0.8],
        "answers": {"4/255": [0.5, 0.5]},
    }
    row |= {"zero_shot_clean": [1.0, 1.0], "zero_shot": [0.25, 0.75], "drift": [0.9, 0.8], "cpu_seconds": [60, 70]}
    pair = {"one": "both", "other": "pooled", "eps": "8/255"}
    content = {
        "command": "python recipes/research/compare_towers.py",
        "seeds": [0, 1],
        "training": {
            "max_steps": 7,
            "per_device_train_batch_size": 8,
            "attack_eps": 8 / 255,
            "attack_steps": 2,
            "lr_scheduler_type": "cosine",
        },
        "measuring": {"attack_steps": 9, "restarts": 1, "zero_shot_steps": 11},
        "hashes": {"clip": "c" * 64, "llava": "d" * 64},
        "versions": {"torch": "1"},
        "num_questions": 123,
        "num_images": 45,
        "rows": [row | {"source": ["abc"]}],
        "paired": [
            pair | {"difference": 0.1, "low": 0.05, "high": 0.15},
            pair | {"difference": -0.1, "low": -0.15, "high": -0.05},
            pair | {"difference": 0.1, "low": -0.05, "high": 0.15},
        ],
        "choice": [{"label": "x", "learning_rate": 1e-3, "clean_accuracy": 0.5, "robust_accuracy": 0.25}],
        "choice_questions": 67,
    }
    text = write_towers(content, tmp_path).read_text()
    assert "| Sim-CLIP, `both` | 0.002 | 85.0 ± 7.1 | 50.0 ± 0.0 | 100.0 ± 0.0 | 50.0 ± 35.4 | 0.850 | 65 |" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines() if line.startswith("| both - pooled")] == [
        "higher",
        "lower",
        "not distinguished",
    ]
    assert "67 validation questions" in text
    assert json.loads((tmp_path / "results" / "towers.json").read_text()) == content
    assert "validation" not in write_towers(content | {"choice": []}, tmp_path).read_text()


@pytest.mark.slow
def test_the_command_writes_its_page_and_goes_on_from_what_is_there(tmp_path):
    pytest.importorskip("easy_vqa")
    command = [sys.executable, str(ROOT / "recipes" / "research" / "compare_towers.py"), *SMALL]
    command += ["--output_dir", str(tmp_path / "towers"), "--docs", str(tmp_path / "docs")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "towers").rglob("robustness.json")}
    assert len(written) == 4 + 1 + 4  # the choice, the original, two features with two seeds
    content = json.loads((tmp_path / "docs" / "results" / "towers.json").read_text())
    assert [row["label"] for row in content["rows"]] == ["original", "Sim-CLIP, `pooled`", "Sim-CLIP, `both`"]
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--features", "cls"], "no feature 'cls'; there are 'pooled'"),
        (["--features", "pooled+attack_eps"], "wanted FEATURE+NAME=VALUE, got 'pooled+attack_eps'"),
        (["--features", "pooled+radius=1/255"], "radius is no argument of Sim-CLIP that a row may set"),
        (["--features", "pooled+attack_steps=0"], "attack_steps must be at least 1"),
        (["--features", "pooled+token_distance=l3"], "token_distance"),
        (["--features", "pooled+seed=7"], "seed is no argument of Sim-CLIP that a row may set"),
        (["--features", "pooled+attack_random_start=no"], "attack_random_start is true or false, got 'no'"),
        (["--features", "pooled+attack_steps=2.5"], "attack_steps is a number, got '2.5'"),
        (["--asked", "demo-smolvlm"], "only if both see by a CLIP; leave out --asked"),
    ],
)
def test_unknown_words_are_refused(recipe, words, refused, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare_towers.py", *words])
    monkeypatch.setattr(recipe, "perform_all", lambda *_: 1 / 0)
    with pytest.raises(SystemExit):
        recipe.main()
    assert refused in capsys.readouterr().err


@pytest.mark.parametrize("feature", ["pooled", "patch_tokens", "language_and_patch_tokens"])
def test_a_tower_of_the_vlms_own_is_hardened_in_place(recipe, feature, tmp_path):
    """At each feature; `changes` reach the trainer, and the language model is the original's."""
    row = recipe.Row("sim-clip", feature, (("attack_eps", "16/255"), ("attack_steps", "1")))
    training = recipe.Training(row, 0, 1e-3, 1, 2, "demo-smolvlm")
    assert row.label == f"Sim-CLIP, `{feature}`, attack_eps 16/255, attack_steps 1"
    record = recipe.harden(training, tmp_path)
    assert (record["eps"], record["attack_steps"]) == (pytest.approx(16 / 255), 1)
    old, new = (
        load_file(recipe.folder_of("demo-smolvlm") / "model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    changed = {name for name in old if not torch.equal(old[name], new[name].to(old[name]))}
    assert changed
    assert all("vision_model" in name for name in changed)
    measuring = recipe.Measuring("validation", recipe.EPS[:1], 2, 1, 1, 2, 1, "demo-smolvlm")
    (answers,) = recipe.measure(training, measuring, tmp_path, tmp_path / "answers", record)
    assert answers.task == "vqa"
    assert answers.training["eps"] == record["eps"]


def test_what_a_row_says_is_of_its_type(recipe):
    words = {"attack_random_start": "false", "attack_steps": "5", "ema_decay": "0.9", "attack_eps": "16/255"}
    row = recipe.Row("sim-clip", "pooled", tuple((words | {"token_distance": "cosine"}).items()))
    said = recipe.Training(row, 0, 1e-3, 1, 2).arguments()
    assert said["attack_random_start"] is False
    assert (said["attack_steps"], said["ema_decay"], said["token_distance"]) == (5, 0.9, "cosine")
    assert said["attack_eps"] == pytest.approx(16 / 255)


def test_a_clip_is_hardened_as_a_vlm_reads_it(recipe, tmp_path):
    """Another projector is another training; patch tokens know nothing of it."""
    other = tmp_path / "other"
    shutil.copytree(recipe.folder_of("demo-llava"), other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "model.safetensors")
    for feature, same in (("patch_tokens", True), ("language_tokens", False)):
        mine = recipe.Training(recipe.Row("sim-clip", feature), 0, 1e-3, 1, 2)
        assert (mine.folder(tmp_path) == replace(mine, vlm=str(other)).folder(tmp_path)) == same
    assert recipe.harden(mine, tmp_path / "tower")["feature"] == "language_tokens"
    old, new = (
        load_file(recipe.demo_checkpoint() / "model.safetensors"),
        load_file(tmp_path / "tower/model.safetensors"),
    )
    assert any(not torch.equal(old[name], new[name].to(old[name])) for name in old)


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (None, None),
        ([], "towers.json was made with max_steps 100, not 140"),
        (["--steps", "100", "--learning_rates", "2e-3"], "made with questions 150, not 250"),
        (["--docs", "d"], None),
    ],
    ids=["as published", "bare", "half", "elsewhere"],
)
def test_published_numbers_are_replaced_by_their_like_only(recipe, words, refused, monkeypatch, capsys):
    if words is None:
        words = shlex.split(json.loads((ROOT / "docs" / "results" / "towers.json").read_text())["command"])[2:]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["compare_towers.py", *words])
    monkeypatch.setattr(recipe, "perform_all", lambda *_: 1 / 0)
    with pytest.raises(SystemExit if refused else ZeroDivisionError):
        recipe.main()
    assert not refused or refused in capsys.readouterr().err


def test_other_checkpoints_have_folders_of_their_own(recipe, monkeypatch, tmp_path):
    """What was trained or measured with one checkpoint is not read back for the next."""
    training = recipe.Training(recipe.Row("sim-clip", "pooled"), 0, 1e-3, 2, 4)
    measuring = recipe.Measuring("test", (0.1,), 1, 1, 1, 1, 1)
    folders = []
    for place, (clip, llava) in enumerate((("a", "a"), ("b", "a"), ("a", "b"), ("a", "a"))):
        for name, content in (("demo-clip", clip), ("demo-llava", llava)):
            (tmp_path / str(place) / name).mkdir(parents=True)
            (tmp_path / str(place) / name / "model.safetensors").write_text(content)
        monkeypatch.setattr(
            "hardened_tower.demo_checkpoint", lambda name="demo-clip", at=place: tmp_path / str(at) / name
        )
        monkeypatch.setattr("hardened_tower.sees_by_clip", lambda vlm: True)
        folders.append((training.folder(tmp_path), measuring.folder(tmp_path)))
    (first, other_clip, other_llava, again) = folders
    assert again == first
    assert other_clip[0] != first[0] == other_llava[0]
    assert len({measured for _, measured in folders}) == 3
