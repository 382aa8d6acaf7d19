"""`compare`: models measured alike, one table, one page."""

from __future__ import annotations

import json
import shutil

from hf_robust_vision.cli import main
from hf_robust_vision.evaluation.results import load_results


QUICK = ["--protocol", "quick", "--steps", "2", "--eps", "1/255", "4/255", "--device", "cpu", "--output_dir", "out"]


def test_two_models(clip_folder, image_folder, tmp_path, monkeypatch, capfd):
    """Each line of the table is what `evaluate` says of that model alone."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(clip_folder, tmp_path / "mine")
    words = ["compare", f"before={clip_folder}", "mine", "--dataset", str(image_folder), *QUICK]
    assert main(words) == 0
    said = capfd.readouterr()
    assert "it/s" not in said.err
    results = load_results("out")
    assert [(row.model, round(255 * row.eps)) for row in results] == [
        ("before", 1),
        ("before", 4),
        ("mine", 1),
        ("mine", 4),
    ]
    lines = [line.split() for line in said.out.splitlines()]
    head = lines.index(["model", "clean", "1/255", "4/255"])
    assert [line[0] for line in lines[head + 1 : head + 3]] == ["before", "mine"]
    assert f"{100 * results[1].robust_accuracy:.1f}" in lines[head + 1]
    # The second table is the difference of each to the first, which is nothing here: the weights are equal.
    at = next(place for place, line in enumerate(lines) if line[:2] == ["minus", "before,"])
    assert lines[at + 1] == ["model", "clean", "1/255", "4/255"]
    assert lines[at + 2][:2] == ["mine", "+0.0"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "undefended" in page
    assert "mine" in page
    evaluated = ["evaluate", "mine", "--dataset", str(image_folder), *QUICK[:-1], "alone"]
    assert main(evaluated) == 0
    alone = load_results("alone")
    assert [row.robust_accuracy for row in alone] == [row.robust_accuracy for row in results[2:]]
    capfd.readouterr()
    assert main([*words, "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [row["robust_accuracy"] for row in told["results"]] == [row.robust_accuracy for row in results]
    assert [(row["model"], row["minus"], row["accuracy"], row["eps"]) for row in told["paired"]] == [
        ("mine", "before", "clean_accuracy", None),
        ("mine", "before", "robust_accuracy", 1 / 255),
        ("mine", "before", "robust_accuracy", 4 / 255),
    ]
    for row in told["paired"]:
        assert row["difference"] == 0
        assert row["ci95"][0] < 0 < row["ci95"][1]
    assert told["not_paired"] == ""
