"""The report repeats the results: every number, curve, attack and check, of every model, once."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from hf_robust_vision.evaluation.images import AdversarialImages
from hf_robust_vision.evaluation.results import SampleRecord, save_results
from hf_robust_vision.report.curve import HEIGHT, LEFT, RIGHT, WIDTH, Curve, Point, draw_curves
from hf_robust_vision.report.page import checks_of, read_measured, write_report
from hf_robust_vision.report.tables import results_text
from tests.evaluation.test_results import result, summarize
from tests.report.test_escape import HOSTILE


NAMES = ["cat", "dog", "<b>fox|"]


def measured(model, robust, **changes):
    """One result at 2/255 and one at 4/255 of a model whose weights are its name."""
    shared = {"model": model, "model_sha256": model.ljust(64, "x"), "class_names": NAMES, "templates": ["a {}"]}
    return [
        result(**(shared | {"eps": eps, "robust_accuracy": value, "ci95": interval(value)} | changes))
        for eps, value in zip((2 / 255, 4 / 255), robust)
    ]


def interval(value):
    return {"clean_accuracy": [0.301, 0.951], "robust_accuracy": [value - 0.1, value + 0.1]}


@pytest.fixture
def files(tmp_path):
    before = measured("before", (0.4, 0.2))
    save_results(
        before + measured("after", (0.625, 0.511), training={"method": "Sim-CLIP", "eps": 4 / 255, "step": None}),
        tmp_path / "one",
    )
    save_results(before + measured("tuned", (0.733, 0.522)), tmp_path / "two")
    return [tmp_path / "one" / "robustness.json", tmp_path / "two"]


class Reader(HTMLParser):
    """Texts of the cells of each table, and every tag with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.cell = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        self.cell = None if tag in ("td", "th") else self.cell

    def handle_data(self, data):
        if self.cell:
            self.tables[-1][-1][-1] += f"{data.strip()} " if data.strip() else ""


def test_numbers_of_table_and_markdown(files, tmp_path):
    html, page, curve = write_report(files, tmp_path / "out")
    (accuracy, protocol) = Reader(html.read_text()).tables
    assert [cell.strip() for cell in accuracy[0]] == ["", "clean", "2/255", "4/255"]
    assert [row[0].strip() for row in accuracy[1:]] == ["undefended", "Sim-CLIP", "tuned"]  # the first one once
    assert [cell.strip() for cell in accuracy[2][1:]] == [
        "75.0 % 30.1 to 95.1", "62.5 % 52.5 to 72.5", "51.1 % 41.1 to 61.1",
    ]  # fmt: skip
    assert [cell.strip() for cell in protocol[1]] == ["apgd-ce", "5", "1", "2/255, 4/255", "all"]
    text = page.read_text()
    assert "- Sim-CLIP: method: Sim-CLIP; eps: 4/255\n" in text
    assert "method: Sim-CLIP; eps: 4/255" in html.read_text()
    row = "| Sim-CLIP | 75.0 % (30.1 to 95.1) | 62.5 % (52.5 to 72.5) | 51.1 % (41.1 to 61.1) |"
    assert row in text.splitlines()
    assert "| apgd-ce | 5 | 1 | 2/255, 4/255 | all |" in text.splitlines()
    assert f"]({curve.name})" in text
    assert curve.read_text().startswith('<svg class="curve" xmlns=')


def test_html_needs_nothing_else(files, tmp_path):
    html = write_report(files, tmp_path)[0].read_text()
    tags = Reader(html).tags
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in tags}
    addresses = [value for _, found in tags for key, value in found.items() if key in ("src", "href", "xlink:href")]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert "url(" not in html
    assert "@import" not in html
    assert "http" not in html


def test_markdown_has_no_empty_line_inside_a_table(files, tmp_path):
    lines = write_report(files, tmp_path)[1].read_text().splitlines()
    tables = [place for place, line in enumerate(lines) if re.fullmatch(r"\|(---\|)+", line)]
    assert len(tables) == 2
    for place in tables:
        assert lines[place - 1].count("|") == lines[place].count("|") == lines[place + 1].count("|")
        assert not lines[place - 2]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_can_not_break_the_page(name, tmp_path):
    """findings-reliability 13: all that a result names, in HTML, SVG and Markdown, leaves the page as it is."""

    def pages(name):
        named = {"dataset": name, "split": name, "group": name, "protocol": name, "templates": [f"{name} {{}}"]}
        named |= {"left_out": [name], "training": {"method": name, name: name}, "versions": {name: name}}
        named |= {"attacks": [{"name": name, "steps": 5, "restarts": 1, "target": name}], "template_hash": name}
        named |= {"class_names": [name, "dog"], "sanity": SANITY | {"why": name}}
        save_results(measured(name, (0.4, 0.2), **named), tmp_path)
        return [path.read_text() for path in write_report([tmp_path], tmp_path, title=name)]

    html, page, curve = pages(name)
    plain_html, plain_page, plain_curve = pages("name")
    assert [tag for tag, _ in Reader(html).tags] == [tag for tag, _ in Reader(plain_html).tags]
    assert curve.count("<") == plain_curve.count("<")
    assert len(page.splitlines()) == len(plain_page.splitlines())
    spans = re.compile(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)")
    assert "<" not in spans.sub("", page)
    cells, plain_cells = (
        [re.sub(r"\\\\|\\\|", "", line).count("|") for line in text.splitlines() if line.startswith("|")]
        for text in (page, plain_page)
    )
    assert cells == plain_cells


SANITY = {"verdict": "not run", "flagged": [], "checks": []}


def test_labels(tmp_path):
    save_results(measured("before", (0.4, 0.2)) + measured("after", (0.6, 0.5)), tmp_path / "a")
    other = measured("after", (0.7, 0.6), model_sha256="f" * 64)
    save_results(other, tmp_path / "b")

    def labels(*files):
        return {source.label: source.colour for source in read_measured(files)}

    assert labels(tmp_path / "a") == {"undefended": 0, "after": 1}
    assert labels(f"mine={tmp_path / 'a'}") == {"undefended": 0, "mine": 1}
    assert labels(tmp_path / "b") == {"after": 1}  # grey is kept for the undefended
    both = labels(tmp_path / "a", tmp_path / "b")  # two models of one name are told apart
    assert both == {"undefended": 0, "after afterx": 1, "after ffffff": 2}


def test_other_data_or_attacks_stand_apart_and_are_averaged(tmp_path):
    rows = measured("before", (0.4, 0.2)) + measured("before", (0.6, 0.4), dataset="other")
    save_results(rows, tmp_path / "a")
    html, page, *curves = write_report([tmp_path / "a"], tmp_path)
    assert len(curves) == 2
    mean = Reader(html.read_text()).tables[0]
    assert [cell.strip() for cell in mean[1]] == ["undefended", "75.0 %", "50.0 %", "30.0 %"]
    assert "| undefended | 75.0 % | 50.0 % | 30.0 % |" in page.read_text().splitlines()
    longer = [{"name": "apgd-ce", "steps": 50, "restarts": 1}]
    save_results(measured("before", (0.4, 0.2)) + measured("after", (0.6, 0.4), attacks=longer), tmp_path / "b")
    html, page, *curves = write_report([tmp_path / "b"], tmp_path)
    assert len(curves) == 2  # two tables: 5 and 50 steps are not compared
    assert "Mean over" not in html.read_text() + page.read_text()


def test_a_mean_over_datasets_holds_the_radii_that_all_models_share(tmp_path):
    """findings-code 1: with unequal radii 59 % at 4/255 stood under the heading 8/255."""
    radii = {"first": (2, 4, 8), "second": (2, 8)}
    rows = [
        result(model=model, model_sha256=model * 8, dataset=data, eps=eps / 255, robust_accuracy=1 - eps / 10)
        for data in ("one", "two")
        for model in radii
        for eps in radii[model if data == "two" else "first"]
    ]
    save_results(rows, tmp_path)
    html, page, *_ = write_report([tmp_path], tmp_path)
    mean = Reader(html.read_text()).tables[0]
    assert [[cell.strip() for cell in row] for row in mean] == [
        ["", "clean", "2/255", "8/255"],
        ["first", "75.0 %", "80.0 %", "20.0 %"],
        ["second", "75.0 %", "80.0 %", "20.0 %"],
    ]
    assert "| second | 75.0 % | 80.0 % | 20.0 % |" in page.read_text().splitlines()


def test_corruptions_have_severities(tmp_path):
    family = {"name": "fog", "resolution": 64, "seed": 0, "dtype": "float32", "accuracy": 0.5, "ci95": [0.1, 0.9]}
    rows = [
        result(
            task="corruption",
            norm="none",
            eps=0.0,
            severity=n,
            attacks=[family | {"severity": n}],
            robust_accuracy=n / 10,
        )
        for n in (1, 3, 5)
    ]
    save_results(rows, tmp_path)
    html, page, curve = write_report([tmp_path], tmp_path)
    assert [cell.strip() for cell in Reader(html.read_text()).tables[0][0]][2:] == [
        "severity 1",
        "severity 3",
        "severity 5",
    ]
    assert "| 10.0 % (15.0 to 85.0) | 30.0 % (15.0 to 85.0) | 50.0 % (15.0 to 85.0) |" in page.read_text()
    assert "eps 5: 50.0 %" in curve.read_text()
    assert ">severity<" in curve.read_text()


def test_records_that_say_something_else_are_no_page(tmp_path):
    """findings-reliability 12."""
    folder = with_images(tmp_path, "before", fooled={0})
    path = folder / "samples-before-1.jsonl"
    path.write_text(path.read_text().replace('"fooled_by": "apgd-ce"', '"fooled_by": null'))
    with pytest.raises(ValueError, match=r"samples-before-1\.jsonl"):
        write_report([folder], tmp_path / "out")


def test_unequal_restarts_and_left_out_attacks_are_said(tmp_path):
    more = [{"name": "apgd-ce", "steps": 5, "restarts": 9}]
    rows = measured("before", (0.4, 0.2)) + measured("after", (0.6, 0.4), attacks=more, left_out=["fab-t"])
    save_results(rows, tmp_path)
    html, page, _ = write_report([tmp_path], tmp_path)
    for text in (html.read_text(), page.read_text()):
        assert "not attacked alike at 2/255" in text
        assert "so few classes: fab-t." in text


def test_what_attacks_found_is_no_setting(tmp_path):
    """Each attack of a result carries the accuracy that it left; models differ in it, and were attacked alike."""
    rows = measured("before", (0.4, 0.2)) + measured("after", (0.6, 0.4))
    for place, row in enumerate(rows):
        row.attacks = [row.attacks[0] | {"robust_accuracy": place / 10, "step_size": row.eps, "target": None}]
    save_results(rows, tmp_path)
    page = write_report([tmp_path], tmp_path)[1].read_text()
    assert "| apgd-ce | 5 | 1 | 2/255, 4/255 | all |" in page.splitlines()
    assert "not attacked alike" not in page


def test_what_is_no_accuracy_is_said(tmp_path):
    save_results(measured("before", (0.4, 0.2), task="caption", metric="targeted_success"), tmp_path)
    html, page, curve = write_report([tmp_path], tmp_path)
    assert "images that resist, %" in curve.read_text()
    assert "the attacker's target is not said" in page.read_text()
    assert "targeted success" in html.read_text()


def test_a_missing_radius_is_said(tmp_path):
    save_results([*measured("before", (0.4, 0.2)), measured("after", (0.6, 0.4))[0]], tmp_path)
    html, page, _ = write_report([tmp_path], tmp_path)
    assert Reader(html.read_text()).tables[0][2][3].strip() == "not measured"
    assert "| after | 75.0 % (30.1 to 95.1) | 60.0 % (50.0 to 70.0) | not measured |" in page.read_text()


def test_sanity_section(tmp_path):
    """In the shape of `check_sanity`: what is wanted, the numbers, and why where a check did not pass."""
    passed = {
        "name": "gradients",
        "verdict": "passed",
        "numbers": {"zero_entries": 0.123456},
        "threshold": "zero <= 0.05",
    }
    flagged = {
        "name": "loss rises",
        "verdict": "flagged",
        "numbers": {"risen": [0.5, 0.0]},
        "threshold": "risen >= 0.9",
    }
    skipped = {"name": "as strong as a transfer", "verdict": "not run", "numbers": {}, "threshold": "only <= 0.05"}
    checks = [check | {"why": f"Why {check['name']}."} for check in (passed, flagged, skipped)]
    before = {"verdict": "flagged", "flagged": ["loss rises"], "checks": checks}
    after = {"verdict": "not run", "flagged": [], "checks": [], "why": "No gradient."}
    rows = measured("before", (0.4, 0.2), sanity=before) + measured("after", (0.6, 0.4), sanity=after)
    save_results(rows + measured("third", (0.6, 0.4)), tmp_path)
    html, page, _ = write_report([tmp_path], tmp_path)
    cells = [row for table in Reader(html.read_text()).tables[2:] for row in table]
    assert [[cell.strip() for cell in row] for row in cells] == [
        ["gradients", "passed", "wanted: zero <= 0.05; zero entries: 0.1235"],
        ["loss rises", "flagged", "wanted: risen >= 0.9; risen: 0.5, 0; why: Why loss rises."],
        ["as strong as a transfer", "not run", "why: Why as strong as a transfer."],
        ["all checks", "not run", "why: No gradient."],
    ]
    assert "None were run for third." in html.read_text()
    assert "- undefended, loss rises: **flagged** wanted: risen" in page.read_text()
    assert [check.tone for check in checks_of(before)] == ["good", "bad", "plain"]
    assert checks_of(None) == []


def with_images(folder, model, fooled, ids=(0, 1, 2)):
    """A model's results at two radii whose samples in `fooled` fell at 4/255, with saved images."""
    rows = measured(model, (0.4, 0.2))
    images = AdversarialImages(folder / f"images-{model}")
    for sample in ids:
        clean = torch.full((3, 8, 8), 0.5)
        images.write(sample, clean, {2 / 255: clean + 2 / 255, 4 / 255: clean - 4 / 255})
    for place, row in enumerate(rows):
        names = [None if place == 0 or sample not in fooled else "apgd-ce" for sample in ids]
        records = [
            SampleRecord(sample, sample % 3, sample % 3, (sample + (name is not None)) % 3, 0.0, name)
            for sample, name in zip(ids, names)
        ]
        file = folder / f"samples-{model}-{place}.jsonl"
        file.write_text("".join(f"{json.dumps(vars(record))}\n" for record in records))
        rows[place] = replace(row, images=images.folder.name, samples=file.name, **summarize(records))
    save_results(rows, folder)
    return folder


def test_examples_show_where_models_part(tmp_path):
    weak = with_images(tmp_path / "weak", "before", fooled={0, 1})
    strong = with_images(tmp_path / "strong", "strong", fooled={0})
    html, page, _ = write_report([weak, strong], tmp_path, examples=2)
    table = [line for line in page.read_text().splitlines() if line.startswith(("| 0 |", "| 1 |", "| 2 |"))]
    assert table == [
        "| 1 | dog | 4/255 | undefended | dog | &lt;b&gt;fox\\| |",  # they part: first
        "| 1 | dog | 4/255 | strong | dog | dog |",
        "| 0 | cat | 4/255 | undefended | cat | dog |",  # both fall: second
        "| 0 | cat | 4/255 | strong | cat | dog |",
    ]
    pictures = [found["src"] for tag, found in Reader(html.read_text()).tags if tag == "img"]
    assert len(pictures) == 2 + 2 * 4
    assert "perturbation \N{MULTIPLICATION SIGN}32" in html.read_text()  # half the range over 4/255
    assert "Examples" not in write_report([weak], tmp_path, examples=0)[1].read_text()


def test_examples_are_of_different_classes_first(tmp_path):
    folder = with_images(tmp_path, "before", fooled=set(range(6)), ids=tuple(range(6)))
    page = write_report([folder], tmp_path, examples=4)[1].read_text()
    truths = [line.split("|")[2].strip() for line in page.splitlines() if re.match(r"\| \d \|", line)]
    assert truths == ["cat", "dog", "&lt;b&gt;fox\\", "cat"]


def test_no_result_or_no_file_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match=r"robustness\.json"):
        write_report([tmp_path / "nothing"], tmp_path)
    save_results([], tmp_path)
    with pytest.raises(ValueError, match="no results in"):
        write_report([tmp_path], tmp_path)


def test_lines_for_a_terminal():
    """A table whose columns align, with what each attack leaves where that was counted."""
    rows = measured("before", (0.4, 0.2))
    head, columns, first, second = results_text(rows).splitlines()
    assert head == "before on tiny (test, 4 samples): apgd-ce"
    assert columns.split() == ["radius", "clean", "robust"]
    assert first.split("  ")[-2:] == ["75.0 % (30.1 to 95.1)", "40.0 % (30.0 to 50.0)"]
    assert len({len(line) for line in (columns, first, second)}) == 1
    rows[1].attacks = [{"name": "apgd-ce", "robust_accuracy": 0.3}, {"name": "apgd-t", "robust_accuracy": 0.2}]
    _, columns, first, second = results_text(rows).splitlines()
    assert re.split(r" {2,}", columns.strip()) == ["radius", "clean", "after apgd-ce", "after apgd-t", "robust"]
    assert second.split()[-9:-5] == ["30.0", "%", "20.0", "%"]
    assert len({len(line) for line in (columns, first, second)}) == 1
    assert results_text([*rows, *measured("after", (0.4,))]).count("\n\n") == 1


def test_points_of_a_curve_lie_where_their_numbers_say():
    points = [Point(0, 1.0, 0.9, 1.0), Point(2, 0.5, 0.4, 0.6), Point(8, 0.0, 0.0, 0.1)]
    svg = draw_curves([Curve("m", 1, points)], ("eps", "accuracy, %"), title="t")
    (line,) = re.findall(r'<polyline class="line" stroke="var\(--m1\)" points="([^"]+)"', svg)
    places = [tuple(map(float, place.split(","))) for place in line.split()]
    wide = WIDTH - LEFT - RIGHT
    assert [x for x, _ in places] == [LEFT, LEFT + wide / 4, LEFT + wide]
    top, middle, bottom = (y for _, y in places)
    assert middle == pytest.approx((top + bottom) / 2, abs=0.1)
    assert "m, eps 2: 50.0 % (40.0 to 60.0)" in svg


def test_names_of_curves_that_end_together_do_not_touch():
    curves = [Curve(f"model {i}", i, [Point(0, 1, 1, 1), Point(1, 0.01 * i, 0, 0.1)]) for i in range(8)]
    svg = draw_curves(curves, ("eps", "accuracy, %"), title="t")
    heights = sorted(float(y) for y in re.findall(r'class="name"[^>]* y="([\d.]+)"', svg))
    assert len(heights) == 8
    assert all(below - above > 14 for above, below in zip(heights, heights[1:]))
    assert heights[0] > 0
    assert heights[-1] < HEIGHT
