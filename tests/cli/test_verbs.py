"""Every verb once as it should be used; test_wrong_lines.py holds what fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hf_robust_vision import __version__, pipeline
from hf_robust_vision.cli import VERBS, main, make_parser
from hf_robust_vision.cli.harden import METHODS
from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.methods.sim_clip import SimCLIPTrainer
from hf_robust_vision.pipeline.arguments import PipelineArguments
from hf_robust_vision.pipeline.harden_vlm import VLMArguments, VLMTrainer
from hf_robust_vision.report import page
from hf_robust_vision.terminal import user_errors
from tests.cli.next_lines import next_lines


QUICK = ["--protocol", "quick", "--steps", "2", "--eps", "1/255", "--device", "cpu"]


@pytest.fixture
def folder(clip_folder, image_folder, tmp_path, monkeypatch):
    """A model folder with its own results in it."""
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(clip_folder, tmp_path / "model")
    assert (
        main(
            [
                "evaluate",
                "model",
                "--dataset",
                str(image_folder),
                *QUICK,
                "--save_adversarial",
                "--output_dir",
                "model",
            ]
        )
        == 0
    )
    return model


def test_evaluate_says_the_cost_before_it_starts(folder, image_folder, capsys):
    """findings-journey 3: images, steps, passes, minutes, and what makes it less."""
    assert main(["evaluate", "model", "--dataset", str(image_folder), *QUICK, "--output_dir", "model"]) == 0
    said = capsys.readouterr().out
    cost = r"to measure: 6 images x 2 attack steps over 1 radius = at most 12 passes, about \d+ (s|min) here"
    assert re.search(cost, said)
    assert "--max_samples" in said
    assert said.index("pgd-2") < said.index("to measure") < said.index("after pgd-2")
    assert load_results(folder)[0].num_samples == 6


def test_a_verb_ends_with_where_things_lie_and_what_to_type(folder, image_folder, capfd):
    """And no bar where it is piped; `--json` prints one answer."""
    words = ["evaluate", "model", "--dataset", str(image_folder), *QUICK, "--output_dir", "out"]
    assert main(words) == 0
    said = capfd.readouterr()
    assert "it/s" not in said.err
    numbers, *pages, _, _ = said.out.splitlines()[-5:]
    assert (numbers, pages) == ("numbers: out/robustness.json", ["page: out/report.html", "page: out/report.md"])
    alike = f"--dataset {image_folder} --protocol quick --steps 2 --eps 1/255"
    then = [f"harden fare --model model --dataset {image_folder}", f"compare model OTHER_MODEL {alike}"]
    assert next_lines(said.out) == then
    assert main([*words, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["results"] == [result.to_dict() for result in load_results("out")]


def test_the_demo_is_hardened_with_its_settings(tmp_path, capsys):
    """Which `harden` reads only where no model is named."""
    pytest.importorskip("easy_vqa")
    words = ["evaluate", "demo-clip", *QUICK, "--max_samples", "2", "--skip_corrupt", "--output_dir", str(tmp_path)]
    assert main(words) == 0
    alike = "--max_samples 2 --skip_corrupt --protocol quick --steps 2 --eps 1/255"
    assert next_lines(capsys.readouterr().out) == ["harden fare", f"compare demo-clip OTHER_MODEL {alike}"]


def test_report(folder, tmp_path, capsys):
    assert main(["report", "model", "--output_dir", "page"]) == 0
    assert (tmp_path / "page" / "report.html").is_file()


def test_remeasure(folder, capsys):
    assert main(["remeasure", "model", "model"]) == 0
    assert "of 6 saved" in capsys.readouterr().out


def test_a_model_that_evaluate_measured_gets_its_card(folder, capsys):
    """findings-journey 7: from measuring to publishing without a line of Python."""
    assert not (folder / "README.md").exists()
    assert main(["push", "model", "me/robust", "--dry_run", "--license", "mit"]) == 0
    said = capsys.readouterr().out
    assert "would write model" in said
    assert "would push the model to me/robust" in said
    assert not (folder / "README.md").exists()
    assert main(["card", "model", "--license", "mit"]) == 0
    assert "hf-robust-vision push model OWNER/NAME" in capsys.readouterr().out
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert f"{100 * load_results(folder)[0].robust_accuracy:.1f} %" in card
    (folder / "README.md").write_text(card + "\nMine.\n")
    assert main(["push", "model", "me/robust", "--dry_run"]) == 0
    assert (folder / "README.md").read_text().endswith("Mine.\n")


def test_as_many_examples_are_shown_as_were_saved(clip_folder, image_folder, tmp_path, monkeypatch):
    """findings-journey 10."""
    asked = []
    monkeypatch.setattr(page, "write_report", lambda *_, examples: asked.append(examples) or [])
    words = ["--dataset", str(image_folder), *QUICK, "--save_examples", "6", "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", str(clip_folder), *words]) == 0
    assert asked == [6]


def test_export_and_convert(clip_folder, tmp_path):
    assert main(["export", str(clip_folder), "--to", "open_clip", "--output", str(tmp_path / "tower.pt")]) == 0
    words = ["--base", str(clip_folder), "--output", str(tmp_path / "again")]
    assert main(["convert", str(tmp_path / "tower.pt"), *words]) == 0
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_export_and_convert_know_the_demo(tmp_path):
    assert main(["export", "demo-clip", "--to", "open_clip", "--output", str(tmp_path / "tower.pt")]) == 0
    words = ["--base", "demo-clip", "--output_dir", str(tmp_path / "again")]
    assert main(["convert", str(tmp_path / "tower.pt"), *words]) == 0
    again, shipped = (load_file(place / "model.safetensors") for place in (tmp_path / "again", demo_checkpoint()))
    assert all(torch.equal(again[name], value) for name, value in shipped.items())


def test_harden_own_data(clip_folder, image_folder, tmp_path, monkeypatch, capsys):
    """findings-journey 2, 5 and 10: a folder named by what runs, capped, with its cost, and with a page."""
    monkeypatch.chdir(tmp_path)
    words = [
        "--model_name_or_path",
        str(clip_folder),
        "--dataset_name",
        str(image_folder),
        "--validation_split",
        "validation",
    ]
    words += [
        "--max_steps",
        "1",
        "--attack_steps",
        "1",
        "--test_steps",
        "2",
        "--test_eps",
        "1/255",
        "--use_cpu",
        "true",
    ]
    words += ["--max_test_samples", "4", "--report_to", "none", "--save_strategy", "no", "--templates", "demo"]
    assert main(["harden", "fare", *words]) == 0
    said = capsys.readouterr().out
    output = tmp_path / "outputs" / "fare-tiny-images"
    assert "output: outputs/fare-tiny-images" in said
    assert "measured on 4 of 6 images of test; for all: --max_test_samples 0" in said
    assert "to measure: 8 images" in said
    then = ["swap VLM outputs/fare-tiny-images --output_dir DIR", "push outputs/fare-tiny-images OWNER/NAME --dry_run"]
    assert next_lines(said) == then
    assert {path.name for path in output.glob("report.*")} == {"report.html", "report.md"}
    assert {result.num_samples for result in load_results(output)} == {4}


@pytest.mark.parametrize("method", METHODS)
def test_harden_reads_the_demo_as_its_recipe_does(method, monkeypatch):
    """findings-code 4: not pooled at 1e-5 where the recipe trains both at 2e-3."""
    from hf_robust_vision import pipeline

    ran = []
    monkeypatch.setattr(pipeline, "run", lambda *args: ran.append(args))
    assert main(["harden", method, "--max_steps", "2", "--use_cpu", "true"]) == 0
    ((_, options, args),) = ran
    assert (args.output_dir, args.max_steps, options.max_test_samples) == (f"outputs/{method}-demo", 2, 128)
    assert args.attack_eps == 8 / 255
    assert args.learning_rate > 1e-5


def test_a_model_and_its_data_are_spelled_alike_by_all_verbs():
    """The names of transformers stay as they were."""
    for model, data in (("--model", "--dataset"), ("--model_name_or_path", "--dataset_name")):
        words = [model, "some/clip", data, "photos"]
        for trainer, options in ((SimCLIPTrainer, PipelineArguments), (VLMTrainer, VLMArguments)):
            found, _ = pipeline.parse(trainer, words, options=options, name="x")
            assert (found.model_name_or_path, found.dataset_name) == ("some/clip", "photos")
        for verb in ("evaluate", "attack", "compare"):
            assert make_parser().parse_args([verb, "some/clip", data, "photos"]).dataset == "photos"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"hf-robust-vision {__version__}\n"


@pytest.mark.parametrize("words", [[], *([verb.__name__.rpartition(".")[2].replace("_", "-")] for verb in VERBS)])
def test_help(words, capsys):
    """findings-journey 5."""
    assert main([*words, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: hf-robust-vision")
    if words == ["evaluate"]:
        assert "(default: robustvlm)" in said
        assert "default: 1/255 2/255 4/255" in said
        assert "None" not in said
    if not words:
        assert "130 interrupted" in said
    if words == ["harden"]:
        assert all(f"  {method}" in said for method in METHODS)


def test_help_of_a_method_is_short_unless_all_is_wanted(capsys):
    """findings-journey 5: 756 lines."""
    assert main(["harden", "sim-clip", "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) < 120
    assert "--form" in short
    assert "--test_protocol" in short
    assert "(default: 2/255 4/255 8/255)" in short
    assert "4/255. (default: 4/255)" in short
    assert "--adam_beta1" not in short
    assert main(["harden", "sim-clip", "--help_all"]) == 0
    assert "--adam_beta1" in capsys.readouterr().out


def test_help_loads_no_framework():
    code = "import sys; from hf_robust_vision.cli import main; main(['evaluate', '--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_interrupt_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(page, "write_report", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    # What a shell runs in the background has SIGINT ignored, and Python then sets no handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["report", "x"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


def test_an_interrupted_recipe_ends_alike(monkeypatch, capsys):
    def run(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", run)
    with pytest.raises(SystemExit) as end:
        pipeline.main(SimCLIPTrainer, ["--use_cpu", "true"])
    assert end.value.code == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


@pytest.mark.parametrize(
    "error", [KeyError("x"), AttributeError("x"), TypeError("x"), RuntimeError("x"), AssertionError()]
)
def test_a_fault_of_the_program_keeps_its_traceback(error):
    with pytest.raises(type(error)), user_errors():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\nlines"),
        OSError(28, "No space left on device", "model.safetensors"),
        PermissionError(13, "Permission denied", "out"),
        ModuleNotFoundError("No module named 'x'"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        EOFError(),
    ],
)
def test_what_a_user_can_mend_is_one_line(error):
    """findings-reliability 16."""
    with pytest.raises(SystemExit) as caught, user_errors():
        raise error
    assert caught.value.code.startswith("error: ")
    assert "\n" not in caught.value.code
    assert str(getattr(error, "filename", None) or "") in caught.value.code
    assert len(caught.value.code) > len("error: ")


def test_the_help_of_harden_vlm_is_its_own(capsys):
    """Not that of `harden`, whose parser reads its words."""
    assert main(["harden-vlm", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the vision tower inside a VLM, in place" in said
    assert "measure again" not in said
