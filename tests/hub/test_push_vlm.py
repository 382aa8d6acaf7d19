"""A VLM with another tower in it, from `swap` or `interpolate` to what a push uploads."""

from __future__ import annotations

import shutil

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_robust_vision.cli import main
from hf_robust_vision.hub.card import license_of
from hf_robust_vision.hub.release import prepare_release


pytest.importorskip("easy_vqa")


def ask(folder):
    """By the line that `swap` and `harden-vlm` print."""
    quick = ["--max_samples", "2", "--steps", "1", "--restarts", "1", "--eps", "8/255", "--save_examples", "0"]
    assert main(["evaluate-vlm", str(folder), *quick, "--device", "cpu", "--output_dir", str(folder)]) == 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What `swap` wrote, measured."""
    folder = tmp_path_factory.mktemp("swapped") / "vlm"
    assert main(["swap", "demo-llava", "demo-clip", "--output_dir", str(folder)]) == 0
    ask(folder)
    return folder


@pytest.fixture
def folder(measured, tmp_path):
    return shutil.copytree(measured, tmp_path / "vlm")


def test_what_swap_wrote(folder, capsys):
    before = sorted(folder.iterdir())
    assert main(["push", str(folder), "me/x", "--dry_run", "--license", "mit"]) == 0
    said = capsys.readouterr().out
    assert f"would write {folder / 'README.md'}\nwould push the vlm to me/x" in said
    assert {"swap_report.json", "model.safetensors", "processor_config.json", "README.md"} <= set(said.split())
    assert sorted(folder.iterdir()) == before, "a dry run leaves nothing behind"
    assert main(["card", str(folder), "--license", "mit", "--name", "My VLM"]) == 0
    assert f"wrote {folder / 'README.md'}\n" in capsys.readouterr().out
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.text.lstrip().startswith("# My VLM")
    assert "clip" not in card.data.tags
    assert (
        "A `LlavaForConditionalGeneration` made from `demo-llava`: its vision tower is that of `demo-clip`"
        in card.text
    )
    assert "fine-tuned against" not in card.text, "of a tower from elsewhere nobody here knows that"
    assert "unknown" not in card.text
    assert "Not recorded." not in card.text


def test_what_harden_vlm_wrote_of_own_images(tmp_path, capsys):
    """The line that it prints measures; the card tells method, original and training."""
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 40, 80)).save(tmp_path / f"{number}.png")
    out = tmp_path / "out"
    words = ["--dataset", str(tmp_path), "--max_steps", "1", "--attack_steps", "1", "--test_steps", "1", "--seed", "0"]
    words += [
        "--per_device_train_batch_size",
        "2",
        "--save_strategy",
        "no",
        "--report_to",
        "none",
        "--use_cpu",
        "true",
    ]
    assert main(["harden-vlm", "demo-llava", *words, "--output_dir", str(out)]) == 0
    assert f"evaluate-vlm {out} --questions FILE --output_dir {out}" in capsys.readouterr().out
    ask(out)
    assert main(["card", str(out)]) == 0
    card = ModelCard.load(out / "README.md")
    assert "A `LlavaForConditionalGeneration` made from `demo-llava`: its vision tower was fine-tuned" in card.text
    assert "Sim-CLIP" in card.text
    assert "- attack steps: 1" in card.text
    assert card.data.license == "apache-2.0"
    assert "sim-clip" in card.data.tags
    assert "clip" not in card.data.tags
    assert prepare_release(out).kind == "vlm"


def test_harden_vlm_names_the_line_before_it_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("hf_robust_vision.pipeline.harden_vlm.check_push", lambda args: None)
    words = ["--dataset", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--push_to_hub", "true"]
    assert main(["harden-vlm", "demo-llava", *words, "--use_cpu", "true", "--report_to", "none"]) == 1
    line = f"hf-robust-vision evaluate-vlm {tmp_path / 'out'} --output_dir {tmp_path / 'out'}"
    assert line in capsys.readouterr().err


def test_a_folder_s_name_is_nobody_s_licence(tmp_path, monkeypatch):
    """An original that was a local folder is not looked for on the Hub."""
    asked = []
    monkeypatch.setattr(ModelCard, "load", lambda *names, **_: asked.append(names))
    assert license_of("my-vlm") is None
    assert asked == []


def test_what_interpolate_wrote(tmp_path):
    out = tmp_path / "between"
    words = ["demo-llava", "demo-llava", "--weight", "0.5", "--output_dir", str(out)]
    assert main(["interpolate", *words]) == 0
    ask(out)
    assert main(["card", str(out)]) == 0
    release = prepare_release(out)
    assert release.kind == "vlm"
    assert "interpolate_report.json" in release.files


@pytest.mark.parametrize("what", ["model", "tower"])
def test_it_is_pushed_whole(folder, what, capsys):
    assert main(["push", str(folder), "me/x", "--dry_run", "--what", what]) == 1
    assert f"holds a LlavaForConditionalGeneration, which is pushed whole; leave out --what {what}" in (
        capsys.readouterr().err
    )
    assert not (folder / "README.md").exists()


def test_a_push_that_is_refused_leaves_no_card(folder, capsys):
    weights = load_file(folder / "model.safetensors")
    weights[min(weights)] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before = sorted(path.name for path in folder.iterdir())
    assert main(["push", str(folder), "me/x", "--dry_run"]) == 1
    assert "was measured on other weights" in capsys.readouterr().err
    assert main(["push", str(folder), "a/b/c", "--dry_run"]) == 1
    assert sorted(path.name for path in folder.iterdir()) == before


def test_the_refusal_names_the_line_to_type(folder, measured, clip_folder, capsys):
    (folder / "robustness.json").unlink()
    for place, verb in ((folder, "evaluate-vlm"), (clip_folder, "evaluate")):
        assert main(["push", str(place), "me/x", "--dry_run"]) == 1
        assert f"hf-robust-vision {verb} {place} --output_dir {place}" in capsys.readouterr().err
