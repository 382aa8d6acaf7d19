"""`evaluate-vlm`: what a VLM says about one's own images under attack, with a report, resumed, and for machines."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoProcessor

from hf_robust_vision.cli import main
from hf_robust_vision.data.demo import demo_checkpoint
from hf_robust_vision.data.demo_questions import load_questions
from hf_robust_vision.data.questions import read_questions
from hf_robust_vision.evaluation.results import load_results, load_samples
from hf_robust_vision.evaluation.tasks import VLMProtocol, evaluate_vqa
from hf_robust_vision.towers.load import load_named
from tests.cli.next_lines import next_lines


pytest.importorskip("easy_vqa")
QUICK = ["--eps", "8/255", "--steps", "2", "--restarts", "1", "--device", "cpu"]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A folder with six images, and a file of questions about them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    with open("mine.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "question", "answer"])
        for question in load_questions("test", yes_no=False, limit=6):
            shutil.copy(question.image, "photos")
            rows.writerow([f"photos/{Path(question.image).name}", question.text, question.answer])
    return tmp_path


def test_own_questions(own, capfd):
    """The numbers are those of `evaluate_vqa`; standard output holds the answer alone, and no bar is piped."""
    words = ["evaluate-vlm", "demo-llava", "--questions", "mine.csv", *QUICK, "--output_dir", "out", "--json"]
    assert main(words) == 0
    said = capfd.readouterr()
    (told,) = json.loads(said.out)["results"]
    assert "to measure: 6 images" in said.err
    assert "it/s" not in said.err
    folder = demo_checkpoint("demo-llava")
    (direct,) = evaluate_vqa(
        load_named(folder),
        AutoProcessor.from_pretrained(folder),
        read_questions("mine.csv"),
        VLMProtocol((8 / 255,), steps=2, restarts=1),
        prompt="{}",
        model_name="x",
        dataset="mine",
        split="all",
        progress=False,
    )
    (saved,) = load_results("out")
    for name in ("clean_accuracy", "robust_accuracy", "num_samples", "dataset", "model_sha256", "eps"):
        assert told[name] == getattr(saved, name) == getattr(direct, name)
    assert saved.clean_accuracy > saved.robust_accuracy
    assert [record.id for record in load_samples(own / "out" / saved.samples)] == [1, 2, 3, 4, 5, 6]
    assert "demo-llava" in (own / "out" / "report.html").read_text()
    assert len(list((own / "out" / saved.images).glob("*.safetensors"))) == 4
    before = (own / "out" / saved.samples).read_text()
    assert main(words) == 0  # a repeated one measures nothing
    assert (own / "out" / saved.samples).read_text() == before


def test_captions(own, capsys):
    pytest.importorskip("sacrebleu")
    rows = [{"image": f"photos/{file.name}", "caption": ["red", "a circle"]} for file in (own / "photos").iterdir()]
    (own / "mine.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    words = ["--captions", "mine.jsonl", "--prompt", "what color is the shape?", *QUICK, "--output_dir", "out"]
    assert main(["evaluate-vlm", "demo-llava", *words]) == 0
    said = capsys.readouterr().out
    then = ["harden-vlm demo-llava --dataset IMAGES", "swap demo-llava HARDENED_TOWER --output_dir DIR"]
    assert next_lines(said) == then
    (result,) = load_results("out")
    assert (result.task, result.metric, result.num_samples) == ("caption", "chrF2", 2)
    assert [attack["name"] for attack in result.attacks] == ["pgd-2-nll-ref0"]
    assert "robust" in said


def test_the_demo_is_asked_by_default(own, capsys):
    assert main(["evaluate-vlm", "demo-llava", *QUICK, "--max_samples", "2", "--output_dir", "out"]) == 0
    (result,) = load_results("out")
    assert (result.dataset, result.split, result.group, result.num_samples) == ("easy-vqa", "test", "colour/shape", 2)
    said = capsys.readouterr().out
    assert "demo-llava on easy-vqa (test, colour/shape, 2 samples): answer accuracy, vlm-pgd-2\n" in said
    assert "linf 8/255" in said
