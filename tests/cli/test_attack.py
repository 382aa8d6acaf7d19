"""`attack`: picture files that fool the model, inside their ball, with a record that says how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import DatasetCard
from transformers import CLIPModel, CLIPProcessor

from hf_robust_vision.cli import main
from hf_robust_vision.data.decode import decode_image
from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.hub.adversarial import AttackedImage, load_record, write_metadata


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


def test_the_folder_is_a_data_set(attacked):
    """`load_dataset` reads it as the Hub would, with the classes; the card says what the images are no good for."""
    _, _, out = attacked
    record = load_record(out)
    assert record.to_dict() == json.loads((out / "attack.json").read_text())
    rows = datasets.load_dataset(str(out), split="adversarial", cache_dir=str(out.parent / "cache"))
    assert rows.features["label"].names == load_results(out)[0].class_names
    assert isinstance(rows.features["image"], datasets.Image)
    by_id = {str(one.id): one for one in record.images}
    assert len(rows) == len(by_id)
    for row in rows:
        one = by_id[row["id"]]
        assert (rows.features["label"].int2str(row["label"]), row["clean"]) == (one.label, one.clean)
        assert (row["adversarial"], row["fooled_by"]) == (one.adversarial, one.fooled_by)
        assert (decode_image(row["image"]) - decode_image(out / one.file)).abs().max() == 0
    card = DatasetCard.load(out / "README.md")
    assert {"adversarial-examples", "transfer-only"} <= set(card.data.tags)
    assert card.data.license is None
    assert "Do not take accuracy on these files for robustness" in card.text
    assert "transfer only, not white-box" in card.text.split("\n\n")[0]
    fooled, wrong = (sum(one.fooled_by == by for one in record.images) for by in ("pgd-3", "clean"))
    assert f"{fooled} images fool the model, {wrong} are clean ones" in " ".join(card.text.split())


def test_a_readme_of_ones_own_is_kept(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    Path("out/README.md").write_text("mine")
    assert main(["attack", "demo-clip", "--max_samples", "1", "--output_dir", "out"]) == 1
    assert "holds a README.md, which would be replaced" in capfd.readouterr().err
    assert Path("out/README.md").read_text() == "mine"


def test_classes_of_one_name_and_of_any_letters(tmp_path):
    """No `ClassLabel` takes a name twice; names are texts then."""
    rows = [AttackedImage(f"images/{n}.png", n, name, name, None, "clean") for n, name in enumerate(["é %", "b"])]
    for names, wanted in ((["b", "é %"], [1, 0]), (["b", "é %", "b"], ["é %", "b"])):
        write_metadata(rows, names, tmp_path / "metadata.parquet")
        table = datasets.Dataset.from_parquet(str(tmp_path / "metadata.parquet"), cache_dir=str(tmp_path / "cache"))
        assert table["label"][:] == wanted
        assert table["file_name"][:] == ["images/0.png", "images/1.png"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda values: values.pop("eps"), "missing 1 required .*'eps'"),
        (lambda values: values.update(images=None), 'with a list "images"'),
        (lambda values: values["images"][1].update(label=3), "image 2: label must be str, got 3"),
    ],
)
def test_a_damaged_record_is_refused(attacked, damage, said):
    _, _, out = attacked
    values = json.loads((out / "attack.json").read_text())
    damage(values)
    (out / "attack.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"attack\.json.*{said}"):
        load_record(out)
