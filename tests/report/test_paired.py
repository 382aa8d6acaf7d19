"""Models beside the first of their table: sample by sample, or a sentence why not."""

from __future__ import annotations

import json

import pytest

from hf_robust_vision.evaluation.paired import paired_difference
from hf_robust_vision.evaluation.results import SampleRecord, add_results
from hf_robust_vision.report.page import write_report
from hf_robust_vision.report.paired import pairs_of
from tests.evaluation.test_results import result, summarize
from tests.report.test_escape import HOSTILE
from tests.report.test_page import Reader


NAMES = ["cat", "dog", "fox"]


def record(sample, stands, clean=True):
    """A sample of class `sample % 3`, right on the clean image or not, standing or not."""
    truth = sample % 3
    wrong, lost = (truth + 1) % 3, None if stands else "apgd-ce"
    return SampleRecord(sample, truth, truth, truth if stands else wrong, 0.0, lost) if clean else SampleRecord(
        sample, truth, wrong, fooled_by="clean"
    )  # fmt: skip


def write(folder, model, *levels, **changes):
    """Results of a model at 2/255, 4/255, ..., each of the given records, or without a file where these are a number."""
    for place, records in enumerate(levels, 1):
        shared = {"model": model, "model_sha256": model.ljust(64, "x"), "eps": 2 * place / 255, "class_names": NAMES}
        if isinstance(records, int):
            add_results([result(**(shared | {"num_samples": records, "samples": "gone.jsonl"} | changes))], folder)
            continue
        file = f"samples-{len(list(folder.glob('*.jsonl')))}.jsonl"
        add_results([result(**(shared | summarize(records) | {"samples": file} | changes))], folder)
        (folder / file).write_text("".join(f"{json.dumps(vars(one))}\n" for one in records))
    return folder


WEAK = [record(sample, sample < 6, sample < 18) for sample in range(20)]
WEAKER = [record(sample, sample < 2, sample < 18) for sample in range(20)]
STRONG = [record(sample, sample < 15, sample < 17) for sample in range(20)]


def cells(table):
    return [[cell.strip() for cell in row] for row in table]


def test_differences_to_the_undefended_model(tmp_path):
    write(tmp_path, "tuned", STRONG, STRONG)
    write(tmp_path, "before", WEAK, WEAKER)
    html, page, *_ = write_report([tmp_path], tmp_path)
    near, far = paired_difference([1] * 15 + [0] * 5, [1] * 6 + [0] * 14), "+65.0 "
    table = cells(Reader(html.read_text()).tables[1])
    assert table[0] == ["", "clean", "2/255", "4/255"]
    assert table[1][0] == "tuned"  # the undefended one is the first, wherever it was measured
    assert table[1][1].startswith("-5.0 ")
    assert table[1][2] == str(near).replace("(", "").replace(")", "")
    assert table[1][3].startswith(far)
    lines = page.read_text().splitlines()
    place = lines.index("### Difference to undefended")
    assert lines[place + 2] == "| model | clean | 2/255 | 4/255 |"
    assert lines[place + 4].startswith("| tuned | -5.0 (")
    assert str(near) in lines[place + 4]
    for text in (html.read_text(), page.read_text()):
        assert "not corrected for their number" in text
        assert "Not paired" not in text
    # What the samples do not tell apart is written faintly.
    assert 'class="value equal">-5.0<' in html.read_text()
    assert 'class="value">+45.0<' in html.read_text()


def test_one_model_has_no_difference(tmp_path):
    html, page, *_ = write_report([write(tmp_path, "before", WEAK)], tmp_path)
    assert "Difference to" not in html.read_text() + page.read_text()


def test_what_is_missing_is_said_and_not_guessed(tmp_path):
    write(tmp_path, "before", WEAK, WEAKER, WEAKER)
    write(tmp_path, "gone", 20, 20)
    write(tmp_path, "half", STRONG, 20)
    write(tmp_path, "other", [record(sample + 1, True) for sample in range(20)])
    html, page, *_ = write_report([tmp_path], tmp_path)
    sentence = "Not paired with undefended: gone, half at 4/255 (no sample records); other (records of other samples)."
    assert sentence in page.read_text().splitlines()
    assert sentence in html.read_text()
    table = cells(Reader(html.read_text()).tables[1])
    assert [row[0] for row in table[1:]] == ["half"]
    assert table[1][2].startswith("+45.0")
    assert table[1][3:] == ["not paired", "not paired"]  # no record, and not measured at all


def test_without_the_first_ones_records_there_is_no_table(tmp_path):
    write(write(tmp_path, "before", 20), "tuned", STRONG)
    html, page, *_ = write_report([tmp_path], tmp_path)
    assert "Not paired with undefended: tuned (no sample records of undefended)." in page.read_text().splitlines()
    assert "not corrected for their number" not in html.read_text() + page.read_text()
    assert not any("points" in line or "+" in line for line in page.read_text().splitlines() if line.startswith("|"))


def test_for_a_terminal_and_a_machine(tmp_path):
    write(write(tmp_path, "mine", STRONG), "plain", WEAK)
    results = [
        result(**(summarize(found) | {"model": model, "samples": f"samples-{place}.jsonl", "class_names": NAMES}))
        for place, (model, found) in enumerate((("mine", STRONG), ("plain", WEAK)))
    ]
    pairs = pairs_of(results, tmp_path)
    title, head, row = pairs.text().splitlines()
    assert title.startswith("minus mine, in points over the same samples")
    assert head.split() == ["model", "clean", "4/255"]
    assert row.split()[0] == "plain"
    told = pairs.to_dict()
    assert [(one["accuracy"], one["eps"]) for one in told["paired"]] == [
        ("clean_accuracy", None), ("robust_accuracy", 4 / 255),
    ]  # fmt: skip
    found = paired_difference([1] * 6 + [0] * 14, [1] * 15 + [0] * 5)
    assert told["paired"][1] | {"model": "plain", "minus": "mine"} == told["paired"][1]
    assert told["paired"][1]["difference"] == found.value
    assert told["paired"][1]["ci95"] == [found.low, found.high]
    assert told["not_paired"] == ""
    # The undefended model is the first here, too; what was measured otherwise is not compared.
    results[1].model = "before"
    assert pairs_of(results, tmp_path).reference == "before"
    results[1].attacks = [{"name": "apgd-ce", "steps": 50}]
    otherwise = pairs_of(results, tmp_path)
    assert otherwise.text() == "Not paired with before: mine (measured otherwise)."
    results[1].eps = 1.0
    assert pairs_of(results, tmp_path).missing == "Not paired with before: mine (no radius in common)."
    assert pairs_of(results[:1], tmp_path).text() == ""


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_can_not_break_the_page(name, tmp_path):
    """Models and classes in the tables that records make, and in the sentence about what is missing."""

    def pages(name, folder):
        folder.mkdir()
        for model, found in ((f"{name}1", WEAK), (f"{name}2", STRONG), (f"{name}3", 20)):
            write(folder, model, found, class_names=[name, f"{name}x", "fox"], model_sha256=str(len(model)) * 64)
        return [path.read_text() for path in write_report([folder], folder)[:2]]

    html, page = pages(name, tmp_path / "hostile")
    plain_html, plain_page = pages("name", tmp_path / "plain")
    assert [tag for tag, _ in Reader(html).tags] == [tag for tag, _ in Reader(plain_html).tags]
    assert len(page.splitlines()) == len(plain_page.splitlines())
