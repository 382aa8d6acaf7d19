"""What a person sees of a run: the numbers to watch, and robust accuracy as it goes."""

from __future__ import annotations

import re

import pytest
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from hf_robust_vision import pipeline
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.training.progress import BARS, RobustnessBar, curve
from tests.training.helpers import make_trainer


def test_a_curve_is_one_bar_a_share():
    assert curve([0.0, 0.124, 0.125, 0.5, 0.999, 1.0]) == "▁▁▂▅██"
    assert curve([n / 8 for n in range(8)]) == BARS
    assert len(curve([0.5] * 99)) == 40
    assert curve([0.5], "ascii") == curve([0.5], None) == ""


def test_each_evaluation_is_a_line_with_the_curve_so_far(clip_folder, tmp_path, capfd):
    steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(clip_folder, tmp_path, disable_tqdm=False, **steps)
    trainer.train()
    said = capfd.readouterr()
    lines = re.findall(r"step (\d+): clean ([\d.]+) %, robust ([\d.]+) %  (\S*)", said.out)
    logged = [row for row in trainer.state.log_history if "eval_robust_accuracy" in row]
    robust = [row["eval_robust_accuracy"] for row in logged]
    assert [(int(step), float(value)) for step, _, value, _ in lines] == [
        (step, pytest.approx(100 * value, abs=0.051)) for step, value in zip((1, 2), robust)
    ]
    assert lines[-1][3] in (curve(robust), "")
    assert "'loss'" not in said.out, "a log beside the bar, and not over it"
    assert re.search(r"loss=[\d.e-]+, cosine_to_original=", said.err)


def test_no_bar_where_nobody_looks(clip_folder, tmp_path, monkeypatch):
    kinds = [type(one) for one in make_trainer(clip_folder, tmp_path).callback_handler.callbacks]
    assert PrinterCallback in kinds
    assert not {RobustnessBar, ProgressCallback} & set(kinds)
    for shown in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda shown=shown: shown)
        _, args = pipeline.parse(SimCLIPTrainer, ["--output_dir", str(tmp_path)])
        assert args.disable_tqdm is not shown
    _, args = pipeline.parse(SimCLIPTrainer, ["--output_dir", str(tmp_path), "--disable_tqdm", "true"])
    assert args.disable_tqdm is True
