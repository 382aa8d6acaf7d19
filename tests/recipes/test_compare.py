"""The comparison on a budget of nothing: it runs, resumes, and measures both groups."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from benchmarks import demo_benchmark
from compare_methods import METHODS, Method
from PIL import Image

from hf_robust_vision.data.datasets import LabelledImages
from hf_robust_vision.data.demo import CLASS_NAMES
from hf_robust_vision.methods.tecoa import TeCoATrainer


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_compare_runs_and_goes_on_from_what_is_there(tmp_path):
    pytest.importorskip("easy_vqa")
    command = [sys.executable, str(ROOT / "recipes" / "research" / "compare.py"), "--methods", "undefended,tecoa,tima"]
    command += ["--seeds", "0,1", "--steps", "1", "--batch_size", "2", "--images", "2", "--eval_steps", "1"]
    command += ["--output_dir", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("robustness.json")}
    assert len(written) == 5
    content = json.loads((tmp_path / "docs" / "results" / "compare.json").read_text())
    assert {(row["method"], row["group"]) for row in content["rows"]} == {
        (method, group) for method in ("undefended", "tecoa", "tima") for group in ("seen", "unseen")
    }
    assert {row["other"] for row in content["paired"]} == {"TeCoA"}
    assert str(tmp_path) not in (tmp_path / "docs" / "results.md").read_text()
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    # A stronger attack measures the same towers, and has a section of its own.
    towers = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")}
    assert len(towers) == 4
    subprocess.run([*command, "--protocol", "robustvlm", "--eps", "8/255"], check=True, env=environment, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("model.safetensors")} == towers
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "apgd-dlr-targeted with 1 steps towards each of the 9 strongest wrong classes" in page
    assert json.loads((tmp_path / "docs" / "results" / "compare.json").read_text()) == content


@pytest.fixture
def compare(monkeypatch):
    """The recipe as a module."""
    return importlib.import_module("compare")


def test_a_run_is_reused_only_on_the_same_benchmark(compare, tmp_path):
    """Another data folder or another start checkpoint under the same path is another benchmark."""
    demo = demo_benchmark()
    budget = compare.Budget(1, 2, 1e-3)
    measuring = compare.Measuring("apgd-ce", 1, 2, demo.eps, "test")
    others = [replace(demo, fingerprint=name) for name in ("a", "b")]
    others += [replace(demo, class_names=demo.class_names[::-1]), replace(demo, templates="photo")]
    for method in ("tecoa", "undefended"):
        runs = [
            compare.Run(METHODS[method], 0, budget, measuring, each, tmp_path, "") for each in (demo, demo, *others)
        ]
        assert len({run.folder for run in runs}) == 5


@pytest.fixture
def every_class():
    """The demo benchmark on two plain images of every class, the held-out ones among them."""
    rows = [{"image": Image.new("RGB", (64, 64), (label, 0, 0)), "label": label} for label in range(24)] * 2
    return replace(
        demo_benchmark(),
        load=lambda split, transform: LabelledImages(rows, CLASS_NAMES, transform, name="plain", split=split),
    )


def test_a_method_sees_no_image_and_no_name_of_a_held_out_class(compare, every_class, tmp_path):
    class Stop(TeCoATrainer):
        def train(self, *args, **kwargs):
            raise KeyboardInterrupt(self)

    budget = compare.Budget(1, 2, 1e-3)
    measuring = compare.Measuring("apgd-ce", 1, 2, every_class.eps, "test")
    with pytest.raises(KeyboardInterrupt) as stopped:
        compare.perform(compare.Run(Method("stopped", Stop), 0, budget, measuring, every_class, tmp_path, ""))
    trainer = stopped.value.args[0]
    seen, train = every_class.groups()["seen"], trainer.train_dataset
    assert train.class_names == trainer.bank.class_names == seen
    reds = {round(item["images"][0].mean().item() * 255) for item in train}
    assert {CLASS_NAMES[red] for red in reds} == set(seen)
    assert len(train) == 2 * len(seen) == 36


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "1"], "was made with steps 80, not 1, and would be overwritten; repeat its command (python"),
        (["--methods", "tecoa", "--steps", "80"], "not ['tecoa'], and would be overwritten"),
        (["--sweep"], "sweep.json was made with seeds [0], not [0, 1, 2]"),
        (["--sweep", "--seeds", "0"], "was made with steps 95, not 80"),
        (["--protocol", "quick", "--docs", "d"], "the page has no section 'compare-quick'"),
        (["--benchmark", "emoji"], "--benchmark emoji needs --data and --model"),
        (["--data", "somewhere", "--model", "somewhere"], "the demo brings its own"),
        (["--benchmark", "emoji", "--data", "nowhere", "--model", "nowhere"], "prepare_emoji.py"),
        (["--methods", "tima-no-gate", "--docs", "d"], "no method 'tima-no-gate'"),
    ],
)
def test_what_does_not_fit_a_benchmark_is_refused(compare, words, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare, "perform_all", lambda *_: pytest.fail("something ran"))
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    with pytest.raises(SystemExit):
        compare.main()
    assert message in capsys.readouterr().err


class RanError(Exception):
    """The command came past its checks."""


@pytest.mark.parametrize("mode", ["compare", "ablation", "sweep"])
def test_the_published_commands_can_be_repeated(compare, mode, monkeypatch):
    published = json.loads((ROOT / "docs" / "results" / f"{mode}.json").read_text())["command"]
    assert_runs(compare, shlex.split(published)[2:], monkeypatch)


@pytest.mark.parametrize(
    "words", [["--sweep", "--docs", "d"], ["--protocol", "robustvlm", "--images", "8", "--docs", "d"]]
)
def test_another_folder_takes_other_settings(compare, words, monkeypatch):
    assert_runs(compare, words, monkeypatch)


def assert_runs(recipe, words, monkeypatch):
    def ran(*_):
        raise RanError

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(recipe, "perform_all", ran)
    monkeypatch.setattr(sys, "argv", ["recipe.py", *words])
    with pytest.raises(RanError):
        recipe.main()
