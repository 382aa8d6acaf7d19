"""Each class by itself: counted from the records, the worst first."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hf_robust_vision.evaluation.results import wilson_interval
from hf_robust_vision.report.classes import class_tables
from hf_robust_vision.report.page import read_measured, write_report
from tests.report.test_page import Reader, measured, save_results
from tests.report.test_paired import WEAK, WEAKER, cells, record, write


def test_accuracies_of_each_class(tmp_path):
    write(tmp_path, "before", WEAK, WEAKER)
    html, page, *_ = write_report([tmp_path], tmp_path)
    table = cells(Reader(html.read_text()).tables[1])
    assert table[0] == ["class", "images", "clean", "2/255", "4/255"]
    # Of 20 samples 7, 7 and 6 are cats, dogs and foxes; at 2/255 two of each stand, at 4/255 one cat and one dog.
    assert [row[:2] for row in table[1:]] == [["cat", "7"], ["dog", "7"], ["fox", "6"]]
    low, high = wilson_interval(6, 7)
    assert table[1][2] == f"{100 * 6 / 7:.1f} % {100 * low:.1f} to {100 * high:.1f}"
    assert [row[3].split()[0] for row in table[1:]] == ["28.6", "28.6", "33.3"]
    assert [row[4].split()[0] for row in table[1:]] == ["14.3", "14.3", "0.0"]
    lines = page.read_text().splitlines()
    place = lines.index("| class | images | clean | 2/255 | 4/255 |")
    assert lines[place - 2] == "undefended:"
    assert lines[place + 2].startswith(f"| cat | 7 | 85.7 % ({100 * low:.1f} to {100 * high:.1f}) | 28.6 % (")
    assert "<details>" not in html.read_text()
    assert "Worst first" in html.read_text()
    assert "Worst first" in page.read_text()


def test_the_worst_come_first_and_the_others_can_be_opened(tmp_path):
    names = [f"class {number}" for number in range(14)]
    records = [
        replace(record(0, stands), id=f"{number} {place}", label=number, clean=number, adversarial=number)
        for number in range(13)
        for place, stands in enumerate([True] * number + [False] * (13 - number))
    ]
    write(tmp_path, "before", records, class_names=names)
    html, page, *_ = write_report([tmp_path], tmp_path)
    shown, opened = Reader(html.read_text()).tables[1:3]
    assert [row[0].strip() for row in shown[1:]] == names[:10]
    assert [row[0].strip() for row in opened[1:]] == names[:13]  # of the last one there is no image
    summary = re.search(r"<details><summary>(.*?)</summary>", html.read_text())[1]
    assert summary == "3 more: open the table of all 13 classes"
    lines = page.read_text().splitlines()
    assert sum(line.startswith("| class ") for line in lines) == 1 + 10
    assert "3 more classes are in `report.html`." in lines


@pytest.mark.parametrize(
    ("near", "far", "wrong", "order"),
    [
        ({0, 1, 2, 5}, {0, 2}, {3, 6, 8}, ["dog", "cat", "fox"]),  # 1, 1 and 2 stand, then 1, 0 and 1
        ({2}, set(), {4, 5, 8}, ["dog", "cat", "fox"]),  # of those of whom none stands dogs are worse on clean images
    ],
)
def test_ties_are_broken_by_larger_radii_and_then_by_clean_accuracy(tmp_path, near, far, wrong, order):
    """Of nine images 0, 3, 6 are cats, 1, 4, 7 dogs, 2, 5, 8 foxes; those in `near` and `far` stand at a radius."""
    levels = [[record(sample, sample in stands, sample not in wrong) for sample in range(9)] for stands in (near, far)]
    (table,) = class_tables(read_measured([write(tmp_path, "m", *levels)]))
    assert [row.name for row in table.rows] == order


def test_without_records_there_is_no_table(tmp_path):
    save_results(measured("before", (0.4, 0.2)), tmp_path)
    html, page, *_ = write_report([tmp_path], tmp_path)
    assert "Worst first" not in html.read_text() + page.read_text()
    # Of two radii the one with records has a column.
    (table,) = class_tables(read_measured([write(tmp_path, "half", 20, WEAKER)]))
    assert table.radii == ["4/255"]


def test_other_tasks_have_no_classes(tmp_path):
    write(tmp_path, "before", WEAK, task="vqa")
    assert class_tables(read_measured([tmp_path])) == []


def test_other_images_have_no_column(tmp_path):
    others = [record(sample + 1, True) for sample in range(20)]
    write(tmp_path, "before", WEAK)
    write(tmp_path, "later", 20)  # two runs of one model, in two folders
    one = read_measured([tmp_path])[0]
    second = replace(one, result=replace(one.result, eps=4 / 255), records=others)
    (table,) = class_tables([one, second])
    assert table.radii == ["2/255"]
