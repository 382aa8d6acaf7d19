"""The list of datasets: it is read strictly, runs offline on two, and resumes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from itertools import product
from pathlib import Path

import pytest
import yaml

from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.pipeline.measure import measure_model
from hf_robust_vision.report.page import write_report
from recipes import evaluate
from recipes.evaluate import read_list
from tests.conftest import picture


ROOT = Path(__file__).parents[2]
LISTS = sorted((ROOT / "recipes" / "datasets").glob("*.yaml"))


@pytest.fixture
def two(image_folder, tmp_path):
    """The demo and a folder of images."""
    pytest.importorskip("easy_vqa")
    demo = {"name": "easy-vqa", "max_samples": 6}
    folder = {"name": "folder", "dataset": str(image_folder), "templates": "photo"}
    content = {"protocol": "quick", "steps": 1, "eps": ["8/255"], "batch_size": 6, "datasets": [demo, folder]}
    file = tmp_path / "two.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def run(*words, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "evaluate.py"), *map(str, words)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)


def test_two_datasets_offline(two, tmp_path):
    done = run("demo-clip", "--datasets", two, "--save_examples", "1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "evaluate-demo-clip"
    results = load_results(folder)
    assert [(result.dataset, result.num_samples) for result in results] == [("easy-vqa", 6), ("folder", 6)]
    assert [len(result.class_names) for result in results] == [24, 3]
    assert "Mean over 2 datasets" in (folder / "report.md").read_text()
    written = {path: path.stat().st_mtime_ns for path in folder.glob("images-*/*")}
    assert len(written) == 2
    run("demo-clip", "--datasets", two, "--save_examples", "1", "--only", "folder", cwd=tmp_path)
    assert [result.dataset for result in load_results(folder)] == ["easy-vqa", "folder"]  # the other one stays
    assert {path: path.stat().st_mtime_ns for path in written} == written  # nothing is measured twice


@pytest.mark.parametrize("file", LISTS, ids=lambda file: file.stem)
def test_shipped_lists_are_read(file):
    how, sets = read_list(file, None)
    assert how.eps
    assert len({part.name for part in sets}) == len(sets)


def test_the_thirteen():
    how, sets = read_list(ROOT / "recipes" / "datasets" / "zero_shot_13.yaml", None)
    assert len(sets) == 13
    assert how.eps == (2 / 255, 4 / 255)
    assert [attack.objective for attack in how.protocol.attacks] == ["cross-entropy", "targeted-dlr"]
    assert {part.name: part.resolution for part in sets if part.resolution} == {
        "CIFAR-10": 32, "CIFAR-100": 32, "STL-10": 96,
    }  # fmt: skip
    assert all(part.dataset.startswith("clip-benchmark/wds_") for part in sets)
    _, some = read_list(ROOT / "recipes" / "datasets" / "zero_shot_13.yaml", ["Pets"])
    assert [part.name for part in some] == ["Pets"]


@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_one_of_the_thirteen_from_files_laid_out_like_its_own(kind, clip_folder, tmp_path):
    """CLIP_benchmark's layout: shards of `<key>.<jpg or webp>` and `<key>.cls`, names and templates beside them."""
    folder = tmp_path / "wds_imagenet_sketch"
    for split, place in product(("train", "test"), range(2)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / "nshards.txt").write_text("2\n")
        with tarfile.open(folder / split / f"{place}.tar", "w") as shard:
            for i in range(4 * place, 4 * place + 4):
                image = io.BytesIO()
                picture(i, i % 3).save(image, {"jpg": "jpeg"}.get(kind, kind))
                for name, content in (("cls", str(i % 4).encode()), (kind, image.getvalue())):
                    entry = tarfile.TarInfo(f"s{i:07}.{name}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))
    (folder / "classnames.txt").write_text("red\ngreen\nblue\ngreen")
    (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\na {c}.")
    content = yaml.safe_load((ROOT / "recipes" / "datasets" / "zero_shot_13.yaml").read_text())
    content["datasets"] = [part for part in content["datasets"] if part["name"] == "ImageNet-Sketch"]
    content["datasets"][0]["dataset"] = str(folder)
    content["defaults"]["max_samples"] = 7
    file = tmp_path / "one.yaml"
    file.write_text(yaml.safe_dump(content | {"steps": 1, "restarts": 1}))
    how, sets = read_list(file, ["ImageNet-Sketch"])
    with pytest.warns(UserWarning, match=r"\['green'\] stand more than once"):
        results = measure_model(str(clip_folder), sets, how, tmp_path / "out", device="cpu", examples=2)
    assert [(result.dataset, result.num_samples, result.split) for result in results] == [
        ("ImageNet-Sketch", 7, "test")
    ] * 2
    assert results[0].class_names == ["red", "green", "blue", "green"]
    assert results[0].templates == ["a photo of a {}.", "a {}."]
    records = [json.loads(line) for line in (tmp_path / "out" / results[0].samples).read_text().splitlines()]
    assert sorted({record["label"] for record in records}) == [0, 1, 2, 3]
    page = write_report([tmp_path / "out"], tmp_path / "out")[0].read_text()
    assert "ImageNet-Sketch" in page


def test_queries_are_those_of_the_list(two):
    content = yaml.safe_load(two.read_text()) | {"protocol": "autoattack", "queries": 7}
    two.write_text(yaml.safe_dump(content))
    how, _ = read_list(two, None)
    assert [attack.steps for attack in how.protocol.attacks if attack.algorithm == "square"] == [7]


def test_what_else_is_measured(two, tmp_path, monkeypatch):
    asked = {}

    def seen(*_, **settings):
        asked.update(settings)
        raise ValueError("seen")

    monkeypatch.setattr(evaluate, "measure_model", seen)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "demo-clip", "--datasets", str(two), "--sanity", "--corruptions"])
    with pytest.raises(SystemExit, match="seen"):
        evaluate.main()
    assert asked["sanity"]
    assert asked["corruptions"]


def test_misspelt_names_are_refused(two, tmp_path):
    content = yaml.safe_load(two.read_text())
    for change in ({"step": 3}, {"datasets": [{"dataset": "x", "tempaltes": "photo"}]}):
        two.write_text(yaml.safe_dump(content | change))
        with pytest.raises(ValueError, match=r"are no settings"):
            read_list(two, None)
    two.write_text(yaml.safe_dump({"datasets": content["datasets"]}))
    with pytest.raises(ValueError, match=r"lacks \['eps', 'protocol'\]"):
        read_list(two, None)
    two.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="'folder'"):
        read_list(two, ["nope"])


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 4}, {"eps": "4/255"}, {"steps": True}, {"batch_size": 2.5}, {"datasets": {}}, {"datasets": ["demo"]},
        {"defaults": []}, {"norm": 2}, {"datasets": [{"resolution": 0}]}, {"datasets": [{"resolution": 100_000}]},
        {"datasets": [{"max_samples": -1}]}, {"datasets": [{"max_samples": 2.5}]}, {"queries": 5}, {"datasets": [{"split": 3}]},
        {"datasets": [{"skip_corrupt": "no"}]}, {"datasets": [{"max_samples": True}]},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_another_type_or_size_are_refused(two, change):
    """findings-reliability 8 and 16, for the list of datasets."""
    two.write_text(yaml.safe_dump(yaml.safe_load(two.read_text()) | change))
    with pytest.raises(
        ValueError, match=next(iter(change)).rstrip("s") + "|dataset|resolution|max_samples|split|skip_corrupt"
    ):
        read_list(two, None)


def test_a_recipe_ends_in_one_line(two, tmp_path):
    """findings-reliability 16: an output that is a file, and a list that is not there."""
    (tmp_path / "file").write_text("mine")
    for words, said in (
        (["--output_dir", tmp_path / "file"], "is no folder"),
        (["--datasets", "nope.yaml"], "nope.yaml"),
    ):
        done = run("demo-clip", "--datasets", two, *words, cwd=tmp_path)
        assert done.returncode == 1
        assert said in done.stderr
        assert "Traceback" not in done.stderr
