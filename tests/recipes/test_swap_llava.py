"""The recipe's own additions: the strength of the attack, and a chosen text before and after."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel

from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.data.demo_questions import load_questions
from hf_robust_vision.evaluation.results import SampleRecord, load_results
from hf_robust_vision.swap import find_towers
from hf_robust_vision.towers.base import weights_sha256


pytest.importorskip("easy_vqa")
RECIPES = str(Path(__file__).parents[2] / "recipes")
sys.path.insert(0, RECIPES)
swap_llava = importlib.import_module("swap_llava")


sys.path.remove(RECIPES)  # `evaluate.py` there must not be taken for the library in later tests


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["swap_llava.py", *words])
    swap_llava.main()


def test_check_attack_prints_every_cell_and_stops(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(swap_llava, "CHECK_STEPS", (1, 5))
    monkeypatch.setattr(swap_llava, "CHECK_EPS", (1, 64))
    run(monkeypatch, "--check_attack", "--num_questions", "4", "--output_dir", str(tmp_path))
    results = load_results(tmp_path / "check_attack")
    assert [(r.attacks[0]["steps"], round(r.eps * 255)) for r in results] == [(1, 1), (1, 64), (5, 1), (5, 64)]
    shown = capsys.readouterr().out.splitlines()
    cells = [f"{100 * result.robust_accuracy:.0f}" for result in results]
    assert [line.split()[-2:] for line in shown if " step" in line] == [cells[:2], cells[2:]]
    assert results[3].robust_accuracy < results[0].robust_accuracy
    assert not (tmp_path / "model.safetensors").exists()


def test_tower_that_can_not_be_read_stops_before_the_measurement(monkeypatch, tmp_path):
    monkeypatch.setattr(swap_llava, "measure", lambda *_: pytest.fail("measured before the tower was looked at"))
    for tower in (tmp_path / "nothing", demo_checkpoint("demo-llava")):
        with pytest.raises(SystemExit, match="error: --tower .*"):
            run(monkeypatch, "--tower", str(tower), "--output_dir", str(tmp_path / "output"))
    monkeypatch.setattr(swap_llava.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SystemExit, match="needs matplotlib: pip install"):
        run(monkeypatch, "--tower", str(demo_checkpoint()), "--output_dir", str(tmp_path / "output"))


def test_perturbed_tower_is_measured_swapped_and_saved(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    tower, output = CLIPModel.from_pretrained(demo_checkpoint()), tmp_path / "output"
    with torch.no_grad():
        for weight in tower.vision_model.parameters():
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    tower.save_pretrained(tmp_path / "tower")
    AutoProcessor.from_pretrained(demo_checkpoint()).save_pretrained(tmp_path / "tower")
    words = ["--tower", str(tmp_path / "tower"), "--output_dir", str(output), "--num_questions", "2"]
    monkeypatch.setattr(swap_llava, "SANITY", {"samples": 1, "queries": 1})
    run(monkeypatch, *words, "--steps", "1", "--restarts", "1", "--eps", "4/255", "--sanity")
    again = AutoModelForImageTextToText.from_pretrained(output)
    (swapped,) = find_towers(again)
    assert weights_sha256(swapped.module) == weights_sha256(tower.vision_model)
    report = json.loads((output / "swap_report.json").read_text())
    assert report["towers"][0]["sha256_after"] == weights_sha256(tower.vision_model)
    assert report["towers"][0]["sha256_before"] != report["towers"][0]["sha256_after"]
    assert (output / "answers.png").stat().st_size > 1000
    results = {(r.group, r.model, r.eps): r for r in load_results(output)}
    (radius,) = {eps for _, _, eps in results if eps}
    checked = {(r.group, r.model) for r in results.values() if r.sanity is not None}
    assert checked == {("colour/shape", "before"), ("colour/shape", "after")}
    shown = capsys.readouterr().out
    assert "sanity checks, after on easy-vqa, colour/shape, answer accuracy: " in shown
    rows = [line for line in shown.splitlines() if line.lstrip().startswith("colour/shape")]
    for line, name, kind in zip(rows, ("clean", "4/255"), ("clean", "robust"), strict=True):
        values = [getattr(results["colour/shape", m, radius], f"{kind}_accuracy") for m in ("before", "after")]
        assert line.split()[1] == name
        assert [float(cell) for cell in re.findall(r"([\d.]+) %", line)] == [round(100 * value, 1) for value in values]


def test_target_is_measured_before_and_after(monkeypatch, tmp_path, capsys):
    """With the VLM's own tower as the hardened one: the rates are equal."""
    pytest.importorskip("matplotlib")
    words = ["--tower", str(demo_checkpoint("demo-clip")), "--output_dir", str(tmp_path), "--target", "red"]
    run(monkeypatch, *words, "--num_questions", "3", "--steps", "2", "--restarts", "1", "--eps", "16/255")
    results = [result for result in load_results(tmp_path) if result.metric == "targeted_success"]
    assert [result.model for result in results] == ["before", "after"]
    assert results[0].attack_success == results[1].attack_success
    shown = capsys.readouterr().out
    assert "'red' is said  before   after" in shown
    assert "16/255" in shown.split("is said")[1]


def test_the_picture_is_of_a_question_that_the_swap_repairs(tmp_path):
    """Question 2 falls before and stands after; question 1 stands in both, 0 falls in both."""
    asked = load_questions("test", yes_no=False, limit=3)
    stood = {"before": [False, True, False], "after": [False, True, True]}
    results = []
    for model, flags in stood.items():
        records = [SampleRecord(q.id, 1, 1, fooled_by=None if flag else "pgd") for q, flag in zip(asked, flags)]
        (tmp_path / f"{model}.jsonl").write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
        results.append(SimpleNamespace(group="colour/shape", eps=8 / 255, model=model, samples=f"{model}.jsonl"))
    args = argparse.Namespace(eps=[8 / 255], output_dir=tmp_path, num_questions=3)
    assert swap_llava.repaired(results, args) == asked[2]
    assert (
        swap_llava.repaired([results[0], SimpleNamespace(**vars(results[0]) | {"model": "after"})], args) == asked[0]
    )
