"""`attack`: picture files that fool the model, inside their ball, with a record that says how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from hf_robust_vision.cli import main
from hf_robust_vision.data.decode import decode_image
from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import load_results


@pytest.fixture
def attacked(clip_folder, image_folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    words = ["attack", str(clip_folder), "--dataset", str(image_folder), "--protocol", "quick", "--steps", "3"]
    words += ["--eps", "8/255", "--seed", "3", "--device", "cpu", "--output_dir", "out"]
    assert main([*words, "--json"]) == 0
    return words, capfd.readouterr(), tmp_path / "out"


def test_files_and_record(attacked, clip_folder):
    """The stock model takes each file for what the record says, unless rounding undid the attack."""
    _, said, out = attacked
    assert "it/s" not in said.err
    record = json.loads((out / "attack.json").read_text())
    told = json.loads(said.out)
    assert told | record == told
    (result,) = load_results(out)
    assert (record["eps"], record["norm"], record["seed"], record["attacks"]) == (8 / 255, "linf", 3, result.attacks)
    assert record["robust_accuracy"] == result.robust_accuracy
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.png")} == {
        row["file"] for row in record["images"]
    }
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    texts = processor.tokenizer(
        [f"a photo of a {name}." for name in result.class_names], return_tensors="pt", padding=True
    )
    saved, right = AdversarialImages(out / result.images), 0
    for row in record["images"]:
        assert Path(row["file"]).parts[:2] == ("images", row["label"])
        pixels = decode_image(out / row["file"])
        clean, found = saved.read(row["id"], 8 / 255)
        assert (pixels - found).abs().max() <= 0.5 / 255 + 1e-6
        assert (pixels - clean).abs().max() <= 8.5 / 255 + 1e-6
        values = processor.image_processor(pixels, do_rescale=False, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            place = model(pixel_values=values, **texts).logits_per_image.argmax().item()
        right += result.class_names[place] == row["label"]
        assert (row["fooled_by"] == "clean") == (row["clean"] != row["label"])
    assert record["files_accuracy"] == pytest.approx(right / len(record["images"]))


def test_other_models_can_be_measured_on_the_files(attacked, clip_folder):
    _, _, out = attacked
    words = [
        "--dataset",
        str(out / "images"),
        "--split",
        "all",
        "--eps",
        "0",
        "--protocol",
        "quick",
        "--device",
        "cpu",
    ]
    assert main(["evaluate", str(clip_folder), *words, "--output_dir", "transfer"]) == 0
    (result,) = load_results("transfer")
    assert result.clean_accuracy == pytest.approx(json.loads((out / "attack.json").read_text())["files_accuracy"])


def test_what_is_there_is_never_replaced(attacked, capfd):
    words, _, out = attacked
    before = (out / "attack.json").read_bytes()
    assert main(words) == 1
    assert "holds attacked images already" in capfd.readouterr().err
    assert (out / "attack.json").read_bytes() == before
