"""`--json`: one answer for a machine on the standard output, and everything for a person on the error stream."""

from __future__ import annotations

import json
import shutil

import pytest

from hf_robust_vision.cli import VERBS, main, make_parser
from hf_robust_vision.evaluation.results import load_results


QUICK = ["--protocol", "quick", "--steps", "2", "--eps", "1/255", "--device", "cpu"]
SHORT = [
    "--max_steps",
    "1",
    "--attack_steps",
    "1",
    "--use_cpu",
    "true",
    "--report_to",
    "none",
    "--save_strategy",
    "no",
]


@pytest.fixture
def answer(capfd):
    def answer(*words, status=0):
        capfd.readouterr()
        assert main([*map(str, words), "--json"]) == status
        return json.loads(capfd.readouterr().out)

    return answer


@pytest.fixture
def folder(clip_folder, image_folder, tmp_path, monkeypatch):
    """A model folder with its own results and attacked images in it."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(clip_folder, tmp_path / "model")
    words = ["--dataset", image_folder, *QUICK, "--save_adversarial", "--output_dir", "model"]
    assert main(["evaluate", "model", *map(str, words)]) == 0
    return model


def test_every_verb_but_the_app_takes_the_word():
    (verbs,) = (action.choices for action in make_parser()._actions if action.dest == "command")
    assert len(verbs) == len(VERBS)
    for name, parser in verbs.items():
        told = "--json" in parser.format_usage()
        assert told == (name != "app"), name


def test_report(folder, answer):
    pages = answer("report", "model", "--output_dir", "page")["pages"]
    assert pages[:2] == ["page/report.html", "page/report.md"]


def test_remeasure(folder, answer):
    told = answer("remeasure", "model", "model")
    assert told["agree"]
    (row,) = told["results"]
    assert (row["num_samples"], row["changed"], row["threat"]) == (6, [], "linf 1/255")
    assert row["reported"] == load_results(folder)[0].robust_accuracy


def test_a_number_that_does_not_come_out_again(folder, answer):
    samples = folder / load_results(folder)[0].samples
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        line["fooled_by"] = None if line["fooled_by"] else "apgd-ce"
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = answer("remeasure", "model", "model", status=1)
    assert not told["agree"]
    assert told["results"][0]["changed"]


def test_export_and_convert(clip_folder, tmp_path, answer):
    file, again = tmp_path / "tower.pt", tmp_path / "again"
    told = answer("export", clip_folder, "--to", "open_clip", "--output", file)
    assert told["output"] == str(file)
    assert "open_clip" in told["load_with"]
    assert answer("convert", file, "--base", clip_folder, "--output_dir", again) == {"output_dir": str(again)}


def test_push(folder, answer, capfd):
    told = answer("push", "model", "me/robust", "--dry_run", "--license", "mit")
    assert (told["repo_id"], told["kind"], told["license"], told["commit"]) == ("me/robust", "model", "mit", None)
    assert "model.safetensors" in told["files"]


def test_harden(clip_folder, image_folder, tmp_path, answer):
    words = ["--model", clip_folder, "--dataset", image_folder, *SHORT, "--templates", "demo"]
    words += ["--test_steps", "2", "--test_eps", "1/255", "--validation_split", "validation"]
    told = answer("harden", "fare", *words, "--output_dir", tmp_path / "out")
    assert told["output_dir"] == str(tmp_path / "out")
    assert told["results"] == [result.to_dict() for result in load_results(tmp_path / "out")]


def test_a_refusal_answers_nothing(tmp_path, capfd):
    assert main(["harden", "fare", "--json", "--model", str(tmp_path / "none"), "--dataset", "x", *SHORT]) == 1
    said = capfd.readouterr()
    assert said.out == ""
    assert "error:" in said.err
