"""The recipe's own additions: the strength of the attack, and a chosen text before and after."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.evaluation.results import load_results


pytest.importorskip("easy_vqa")
sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))
import swap_llava


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


def test_target_is_measured_before_and_after(monkeypatch, tmp_path, capsys):
    """With the VLM's own tower as the hardened one: the rates are equal."""
    pytest.importorskip("matplotlib")
    words = ["--tower", str(demo_checkpoint("demo-clip")), "--output_dir", str(tmp_path), "--target", "red"]
    run(monkeypatch, *words, "--num_questions", "3", "--steps", "2", "--restarts", "1", "--eps", "16/255")
    results = [result for result in load_results(tmp_path) if result.metric == "targeted_success"]
    assert [result.model for result in results] == ["before", "after"]
    assert results[0].attack_success == results[1].attack_success
    shown = capsys.readouterr().out
    assert "'red' is said      before   after" in shown
    assert "16/255" in shown.split("is said")[1]
