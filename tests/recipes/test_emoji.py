"""The emoji benchmark on packages of a few fabricated emoji in the layout and schema of the real ones."""

from __future__ import annotations

import base64
import hashlib
import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from benchmarks import emoji_benchmark
from PIL import Image, ImageDraw

from hf_robust_vision.data.collator import collate_images
from hf_robust_vision.data.sources import load_labelled_images
from hf_robust_vision.pixels import PixelTransform


ROOT = Path(__file__).parents[2]
TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
TRANSFORM = PixelTransform(64, (64, 64))
KEPT = [
    ("MAN FARMER", "1F468-200D-1F33E"),
    ("WOMAN FARMER", "1F469-200D-1F33E"),
    ("MAN RUNNING", "1F3C3-200D-2642-FE0F"),
    ("WOMAN RUNNING", "1F3C3-200D-2640-FE0F"),
    ("WOMAN: BEARD", "1F9D4-200D-2640-FE0F"),
    ("MAN GOLFING", "1F3CC-FE0F-200D-2642-FE0F"),
    ("MX CLAUS", "1F9D1-200D-1F384"),
    ("LEFT-FACING FIST", "1F91B"),
    ("EAR", "1F442"),
]
DROPPED = [
    ("FARMER", "1F9D1-200D-1F33E"),
    ("RUNNER", "1F3C3"),
    ("PERSON GOLFING", "1F3CC-FE0F"),
    ("MAN RUNNING FACING RIGHT", "1F3C3-200D-2642-FE0F-200D-27A1-FE0F"),
]
ALIKE = ("SNOWBOARDER", "1F3C2")


def entry(name, code, tones=TONES):
    image = f"{code.lower()}.png"
    found = {"name": name, "unified": code, "image": image, "category": "People & Body", "subcategory": "person"}
    found |= {"has_img_google": True, "has_img_twitter": True}
    if tones:
        found["skin_variations"] = {
            tone: {"unified": f"{code}-{tone}", "image": f"{code}-{tone}.png".lower()} for tone in tones
        }
    return found


def png(seed: str) -> bytes:
    """A disc of a colour of its own on nothing."""
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((8, 8, 56, 56), fill=(*hashlib.sha256(seed.encode()).digest()[:3], 255))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def packages(tmp_path):
    """Folders `google` and `twitter`, as `npm pack` and `tar` leave them."""
    entries = [entry(*names) for names in (*KEPT, *DROPPED, ALIKE)]
    entries += [entry("HASH KEY", "0023-FE0F-20E3", ()), entry("HANDSHAKE", "1F91D", ("1F3FB-1F3FC", "1F3FD"))]
    for style in ("google", "twitter"):
        root = tmp_path / style / "package"
        images = root / "img" / style / "64"
        images.mkdir(parents=True)
        for item in entries:
            for file in (item["image"], *(tone["image"] for tone in item.get("skin_variations", {}).values())):
                drawn_once = style == "google" and item["name"] == "SNOWBOARDER"
                (images / file).write_bytes(png("alike" if drawn_once else style + file))
        (root / "emoji.json").write_text(json.dumps(entries))
        (root / "package.json").write_text(json.dumps({"name": f"emoji-datasource-{style}", "version": "16.0.0"}))
        (root / "LICENSE").write_text("The MIT License (MIT)")
    return {style: tmp_path / style for style in ("google", "twitter")}


@pytest.fixture
def recipe(monkeypatch):
    """Import one of the recipes by its name."""
    return importlib.import_module


@pytest.fixture
def prepare(recipe, monkeypatch):
    """Run the prepare recipe with some words, and give back its module."""
    module = recipe("prepare_emoji")

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["prepare_emoji.py", *map(str, words)])
        module.main()

    run.module = module
    return run


@pytest.fixture
def emoji(prepare, packages, tmp_path):
    """The folder that the recipe writes."""
    prepare("--output_dir", tmp_path / "emoji", "--google", packages["google"], "--twitter", packages["twitter"])
    return tmp_path / "emoji"


def test_the_classes_are_toned_emoji_without_mirror_images_and_neutral_twins(emoji):
    names = datasets.load_from_disk(str(emoji))["train"].features["label"].names
    tidy = ["man farmer", "woman farmer", "man running", "woman running", "woman beard", "man golfing", "mx claus"]
    assert names == [*tidy, "left facing fist", "ear"]  # the snowboarder is drawn alike in all tones of one style


def test_every_split_has_every_class_in_both_styles_and_no_image_is_in_two(emoji):
    parts = datasets.load_from_disk(str(emoji))
    for split, tones in {"train": 3, "validation": 1, "test": 2}.items():
        part = parts[split]
        for label in range(len(KEPT)):
            rows = [row for row in part if row["label"] == label]
            drawn = {(row["style"], row["tone"]) for row in rows}
            assert len(rows) == len(drawn) == 2 * tones
            assert {style for style, _ in drawn} == {"google", "twitter"}
            assert len({tone for _, tone in drawn}) == tones
    pixels = [row["image"].tobytes() for part in parts.values() for row in part]
    assert len(set(pixels)) == len(pixels) == 12 * len(KEPT)
    first = [row["tone"] for row in parts["train"] if row["label"] == 0]
    assert any([row["tone"] for row in parts["train"] if row["label"] == label] != first for label in range(1, 9))


def test_the_folder_loads_as_any_other_with_drawings_on_white(emoji):
    dataset = load_labelled_images(emoji, "test", TRANSFORM)
    batch = collate_images(list(dataset))
    assert batch["images"].shape == (4 * len(KEPT), 3, 64, 64)
    assert (batch["images"][:, :, 0, 0] == 1).all()
    row = dataset.rows[3]
    file = next(code for name, code in KEPT if code == row["emoji"]).lower()
    file += "" if row["tone"] == "none" else f"-{row['tone'].lower()}"
    colour = hashlib.sha256(f"{row['style']}{file}.png".encode()).digest()[:3]
    assert (batch["images"][3, :, 32, 32] * 255).round().tolist() == list(colour)


def test_the_same_packages_make_the_same_folder(emoji, prepare, packages, tmp_path):
    prepare("--output_dir", tmp_path / "again", "--google", packages["google"], "--twitter", packages["twitter"])
    one, two = (datasets.load_from_disk(str(folder)) for folder in (emoji, tmp_path / "again"))
    for split in one:
        assert one[split][:] == two[split][:]


def test_a_quarter_of_the_concepts_is_held_out_with_both_genders(prepare):
    names = [f"{who} {what}" for what in "abcdefgh" for who in ("man", "woman")] + ["ear"]
    chosen = prepare.module.held_out(names)
    assert len(chosen) == 4
    assert {f"man {name.split()[1]}" in chosen and f"woman {name.split()[1]}" in chosen for name in chosen} == {True}
    assert prepare.module.held_out(names[::-1]) == chosen[::-1]


def test_the_licences_lie_beside_the_images(emoji):
    text = (emoji / "ATTRIBUTION.md").read_text()
    assert all(word in text for word in ("Apache-2.0", "CC-BY 4.0", "Noto Emoji", "Twemoji", "Changed"))
    assert "Apache License" in (emoji / "LICENSES" / "Apache-2.0.txt").read_text()
    assert "MIT" in (emoji / "LICENSES" / "MIT.txt").read_text()


def test_a_tarball_is_read_if_it_is_the_one_that_was_pinned(prepare, packages, monkeypatch):
    file = packages["google"].with_suffix(".tgz")
    with tarfile.open(file, "w:gz") as tar:
        tar.add(packages["google"] / "package", "package")
    with pytest.raises(ValueError, match=r"google\.tgz is not emoji-datasource-google 16\.0\.0: sha512-"):
        prepare.module.read_package("google", file)
    digest = base64.b64encode(hashlib.sha512(file.read_bytes()).digest()).decode()
    monkeypatch.setitem(prepare.module.INTEGRITY, "google", f"sha512-{digest}")
    found = prepare.module.read_package("google", file)
    assert found == prepare.module.read_package("google", packages["google"])


@pytest.mark.parametrize("fault", ["image", "version", "folder", "name", "full"])
def test_what_is_wrong_is_said_and_nothing_is_written(fault, prepare, packages, tmp_path, capsys):
    package = packages["twitter"] / "package"
    if fault == "image":
        (package / "img" / "twitter" / "64" / "1f442-1f3fd.png").unlink()
        message = "the twitter package has no image 1f442-1f3fd.png of 'ear'"
    elif fault == "version":
        (package / "package.json").write_text(json.dumps({"name": "emoji-datasource-twitter", "version": "15.1.2"}))
        message = "holds emoji-datasource-twitter 15.1.2, wanted emoji-datasource-twitter 16.0.0"
    elif fault == "folder":
        packages["twitter"] = packages["twitter"].parent / "google" / "package" / "img"
        message = "img has no LICENSE, emoji.json, package.json; wanted emoji-datasource-twitter 16.0.0"
    elif fault == "name":
        file = packages["google"] / "package" / "emoji.json"
        file.write_text(file.read_text().replace("LEFT-FACING FIST", "EAR"))
        message = "two emoji have one name: ['ear']"
    else:
        (tmp_path / "emoji").mkdir()
        (tmp_path / "emoji" / "mine.txt").touch()
        message = "emoji is not empty; choose another --output_dir"
    before = {path for path in tmp_path.rglob("*") if "package" not in path.parts}
    with pytest.raises(SystemExit):
        prepare("--output_dir", tmp_path / "emoji", "--google", packages["google"], "--twitter", packages["twitter"])
    assert message in capsys.readouterr().err
    assert {path for path in tmp_path.rglob("*") if "package" not in path.parts} == before


def test_without_npm_the_line_to_type_is_said(prepare, packages, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="npm pack emoji-datasource-twitter@16.0.0` elsewhere and pass --twitter"):
        prepare("--output_dir", tmp_path / "emoji", "--google", packages["google"])


def test_benchmark_holds_out_the_listed_names_and_knows_its_data(emoji, clip_folder, tmp_path):
    benchmark = emoji_benchmark(emoji, clip_folder)
    groups = benchmark.groups()
    assert set(groups["seen"]) | set(groups["unseen"]) == set(benchmark.class_names)
    assert list(groups["unseen"]) == (emoji / "unseen.txt").read_text().split("\n")[:-1]
    assert len(benchmark.load("validation", TRANSFORM)) == 2 * len(KEPT)
    assert emoji_benchmark(emoji, clip_folder).fingerprint == benchmark.fingerprint
    (emoji / "unseen.txt").write_text("ear\n")
    assert emoji_benchmark(emoji, clip_folder).fingerprint != benchmark.fingerprint
    with pytest.raises(ValueError, match=r"has no unseen\.txt; make the folder with python recipes/prepare_emoji\.py"):
        emoji_benchmark(tmp_path, clip_folder)


def test_text_distances_are_told_apart_by_what_names_share(recipe):
    module = recipe("pretrain_emoji_clip")
    names = ("man red", "woman red", "man blue", "green")
    tokenizer = module.build_tokenizer(module.PROMPTS, names)
    encoder = module.as_encoder(module.build_model(tokenizer, patch=32, width=32, layers=1))
    found = module.text_cosines(encoder, tokenizer, names)
    texts = module.make_text_bank(encoder, tokenizer, names, module.PROMPTS)
    cosines = np.triu((texts.embeddings @ texts.embeddings.T).numpy(), 1)
    assert found["man and woman"] == pytest.approx(cosines[0, 1])
    assert found["a shared word"] == pytest.approx(cosines[0, 2])
    assert found["no shared word"] == pytest.approx((cosines[1, 2] + cosines[:3, 3].sum()) / 4)


@pytest.mark.slow
def test_from_the_packages_to_the_page(emoji, tmp_path):
    pytest.importorskip("matplotlib")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    small = ["--max_steps", "1", "--batch_size", "4"]
    tiny = ["--methods", "undefended,tecoa,tima-no-gate", "--seeds", "0,1", "--steps", "1", "--batch_size", "2"]
    tiny += ["--images", "2", "--eval_steps", "1", "--output_dir", "runs", "--docs", "docs"]
    for words in (
        ["pretrain_emoji_clip.py", "--data", "emoji", "--output_dir", "clip", *small],
        ["compare.py", "--benchmark", "emoji", "--data", "emoji", "--model", "clip", *tiny],
    ):
        command = [sys.executable, str(ROOT / "recipes" / words[0]), *words[1:]]
        subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    content = json.loads((tmp_path / "docs" / "results" / "emoji.json").read_text())
    assert content["budget"]["training"]["attack_eps"] == 4 / 255
    assert list(content["rows"][0]["robust_accuracy"]) == ["1/255", "2/255", "4/255", "8/255"]
    assert {row["method"] for row in content["rows"]} == {"undefended", "tecoa", "tima-no-gate"}
    assert {(row["one"], row["other"]) for row in content["paired"]} == {("TIMA, no gate", "TeCoA")}
    assert content["unseen"] == (emoji / "unseen.txt").read_text().split("\n")[:-1]
    assert "emoji in two drawing styles" in (tmp_path / "docs" / "results.md").read_text()
