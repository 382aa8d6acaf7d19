"""The benchmark's page and its two processes, without a measurement."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.towers.zoo import tiny_vlm


ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe(monkeypatch):
    """Modules of the recipe by name."""
    return importlib.import_module


def sections(page):
    """Name of a part to the rest of its section."""
    return {name: text.strip() for name, text in (part.split(":", 1) for part in page.read_text().split("\n## ")[1:])}


def test_parts_that_were_not_run_keep_their_tables(recipe, tmp_path, monkeypatch):
    benchmark = recipe("benchmark")
    page = tmp_path / "benchmark.md"
    page.write_text((ROOT / "docs" / "benchmark.md").read_text())
    old = sections(page)
    assert {"A training step", "Time to robustness"} <= set(old)
    monkeypatch.setattr(benchmark, "scaling_table", lambda *shape: [f"scaling of {shape}"])
    monkeypatch.setattr(benchmark, "options_table", lambda kind, *shape: [f"{kind} of {shape}"])
    for words in ("scaling --rounds 2", "options", "scaling --rounds 4"):
        command = ["recipes/research/benchmark.py", "--output", str(page), "--parts", *words.split()]
        monkeypatch.setattr(sys, "argv", command)
        benchmark.main()
    new = sections(page)
    assert list(new) == [name for name in [*benchmark.PARTS.values(), benchmark.BY_HAND] if name in new]
    assert benchmark.BY_HAND in new
    measured = {"Two processes", "Options of the step"}
    assert {name: new.get(name) for name in old if name not in measured} == {
        name: text for name, text in old.items() if name not in measured
    }
    assert "scaling of (8, 10, 4)" in new["Two processes"]
    assert "scaling of (8, 10, 2)" not in new["Two processes"]
    assert "--parts scaling --rounds 4`" in new["Two processes"]
    assert "--parts options`" in new["Options of the step"]


def test_a_section_of_somebody_else_is_not_lost(recipe):
    page = recipe("benchmark_page")
    with pytest.raises(ValueError, match="'Mine'"):
        page.merge("# Benchmark\n\n## Mine\n\nwords\n", {}, ["Two processes"])


def test_scaling_is_a_ratio_below_its_ceiling(recipe):
    lines = recipe("benchmark_scaling").table(2.0, 3.0, ceiling=4.0)
    assert "| two, DDP (gloo) | 3.00 | 1.50 |" in lines
    assert lines[-1] == "Two processes against one: 1.50, of a ceiling of 2.00; that is 75%."


def test_scaling_refuses_a_world_of_another_size(tmp_path):
    command = [sys.executable, str(ROOT / "recipes" / "research" / "benchmark_scaling.py"), "1", "1", "1", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "BENCHMARK_MEETING": str(tmp_path), "BENCHMARK_COMMANDS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "1 processes train together, not 2" in done.stderr


def test_a_folder_of_random_weights_is_read_with_and_without_its_language_model(recipe, tmp_path):
    benchmark, (vlm, processor) = recipe("benchmark_vlm"), tiny_vlm("smolvlm")
    benchmark.write_random(type(vlm), vlm.config, processor, tmp_path)
    alone, whole = (benchmark.loaded(str(tmp_path), way) for way in (False, True))
    images = alone.probe()
    assert torch.equal(alone(images).language_tokens, whole(images).language_tokens)
    assert whole.origin.whole.lm_head.weight.dtype == torch.bfloat16
    assert {value.dtype for value in whole.parameters()} == {torch.float32}


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_the_peak_of_a_vlm_in_memory_leaves_out_how_it_was_read(recipe, tmp_path):
    """The mapped file and its copy together are no memory that a user needs."""
    benchmark, (vlm, processor) = recipe("benchmark_vlm"), tiny_vlm("smolvlm")
    benchmark.write_random(type(vlm), vlm.config, processor, tmp_path)
    torch.ones(2**27)  # half a GiB, and gone
    above = benchmark.peak()
    benchmark.loaded(str(tmp_path), True)
    assert benchmark.peak() < above - 0.2
