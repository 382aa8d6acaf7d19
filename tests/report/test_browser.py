"""The report in a real browser: what a reader sees is what was measured."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from hf_robust_vision.report.curve import LEFT, RIGHT, WIDTH
from hf_robust_vision.report.page import write_report
from tests.report.test_page import with_images
from tests.report.test_paired import STRONG, WEAK, write


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium")

# Put into a copy of the page, which itself has no script.
LOOK = """<pre id="seen"></pre><script>
const all = (query, look) => [...document.querySelectorAll(query)].map(look);
const box = (element) => { const b = element.getBoundingClientRect(); return [b.width, b.height]; };
window.onload = () => { document.getElementById("seen").textContent = JSON.stringify({
  images: all("img", (e) => [e.complete && e.naturalWidth, ...box(e)]),
  lines: all("svg.curve .line", (e) => [...box(e), e.getTotalLength(), getComputedStyle(e).stroke]),
  bands: all("svg.curve .band", (e) => [...box(e), getComputedStyle(e).fill]),
  names: all("svg.curve .name", (e) => [e.textContent, ...box(e)]),
  rows: all("table.accuracy tbody tr", (e) => e.innerText.replace(/\\s+/g, " ")),
  pairs: all("table.paired tbody tr", (e) => e.innerText.replace(/\\s+/g, " ")),
  faint: all("table.paired .equal", (e) => getComputedStyle(e).color),
  strips: all("svg.strip rect[opacity]", (e) => box(e)[0] / box(e.parentNode)[0]),
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  loaded: performance.getEntriesByType("resource").map((e) => e.name).filter((n) => !n.startsWith("data:")),
}); };
</script>"""


def chromium(folder, *words):
    """One headless run with a profile of its own; as root a container has no other sandbox to give."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder / 'profile'}", "--force-device-scale-factor=1", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    weak = with_images(folder / "weak", "before", fooled={0, 1})
    strong = with_images(folder / "strong", "strong", fooled={0})
    return write_report([weak, strong], folder / "out", examples=2)[0]


@pytest.fixture(scope="module")
def seen(page):
    copy = page.with_name("copy.html")
    copy.write_text(page.read_text().replace("</body>", f"{LOOK}</body>"))
    dom = chromium(page.parent, "--window-size=1100,1400", "--dump-dom", copy.as_uri())
    return json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[1]))


def test_table_shows_the_numbers(seen):
    assert seen["rows"] == [
        "undefended 100.0 % 43.9 to 100.0 100.0 % 43.9 to 100.0 33.3 % 6.1 to 79.2",
        "strong 100.0 % 43.9 to 100.0 100.0 % 43.9 to 100.0 66.7 % 20.8 to 93.9",
    ]
    widths = [0.561, 0.561, 0.731, 0.561, 0.561, 0.731]
    assert seen["strips"] == pytest.approx(widths, abs=0.01)  # as wide as their intervals


def test_differences_are_shown(seen):
    """Of three samples one stands for the second model only: nothing that tells the two apart, so all is faint."""
    assert seen["pairs"] == ["strong +0.0 -56.1 to +56.1 +0.0 -56.1 to +56.1 +33.3 -31.6 to +71.8"]
    assert len(seen["faint"]) == 3


def test_a_narrow_screen_scrolls_inside_its_tables_only(tmp_path):
    """The page with long names in the tables of differences and classes, the hidden one opened."""
    long = [f"{'very long name of a class ' * 3}{number}" for number in range(12)]
    records = [replace(one, id=f"{n} {one.id}", label=n, clean=n) for n in range(12) for one in (WEAK[0], STRONG[10])]
    folder = write(write(tmp_path, "before", records, class_names=long), "m" * 60, records, class_names=long)
    write(folder, "x" * 60, len(records), class_names=long)  # without records, for the sentence
    page = html.escape(write_report([folder], folder)[0].read_text().replace("<details>", "<details open>"))
    frames = "".join(f'<iframe width="{width}" height="800" srcdoc="{page}"></iframe>' for width in (320, 400))
    look = """<pre id="seen"></pre><script>window.onload = () => {
      const seen = [...document.querySelectorAll("iframe")].map(({contentDocument: page}) => ({
        wide: page.documentElement.scrollWidth - page.documentElement.clientWidth,
        tables: [...page.querySelectorAll("table.paired, table.classes")].map((e) => e.getBoundingClientRect().height),
      }));
      document.getElementById("seen").textContent = JSON.stringify(seen);
    };</script>"""
    outside = tmp_path / "narrow.html"
    outside.write_text(f'<!doctype html><meta charset="utf-8">{frames}{look}')
    dom = chromium(tmp_path, "--window-size=1100,1000", "--dump-dom", outside.as_uri())
    views = json.loads(html.unescape(re.search(r'<pre id="seen">(.*?)</pre>', dom, re.DOTALL)[1]))
    assert len(views) == 2
    for view in views:
        assert len(view["tables"]) == 1 + 2 * 2
        assert all(height > 40 for height in view["tables"])
        assert view["wide"] <= 0


def test_curves_are_drawn(seen):
    assert len(seen["lines"]) == len(seen["bands"]) == 2
    for width, height, length, colour in seen["lines"]:
        assert width > 300
        assert height > 50
        assert length >= WIDTH - LEFT - RIGHT  # in the units of the drawing
        assert re.fullmatch(r"rgb\(\d+, \d+, \d+\)", colour)
    assert len({colour for *_, colour in seen["lines"]}) == 2
    assert [name for name, *_ in seen["names"]] == ["undefended", "strong"]
    assert all(width > 20 and height > 5 for _, width, height in seen["names"])


def test_images_are_decoded_and_shown(seen):
    assert len(seen["images"]) == 2 * (1 + 2 * 2)
    assert all(natural == 8 and width > 60 and height > 60 for natural, width, height in seen["images"])


def test_nothing_is_loaded_and_nothing_sticks_out(seen):
    assert seen["loaded"] == []
    assert seen["wide"] <= 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_picture_of_the_page(page, tmp_path, scheme):
    file = tmp_path / "page.png"
    settings = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    chromium(tmp_path, *settings, "--window-size=1100,1400", f"--screenshot={file}", page.as_uri())
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape == (1400, 1100, 3)
    ground, line = {
        "light": ((0xFC, 0xFB, 0xF8), (0x1D, 0x5F, 0xD1)),
        "dark": ((0x15, 0x17, 0x1B), (0x7F, 0xAB, 0xFF)),
    }[scheme]
    assert tuple(pixels[2, 2]) == ground
    assert 0.4 < (pixels == ground).all(2).mean() < 0.98
    assert (pixels == line).all(2).sum() > 300  # the second model's curve
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100


def test_it_prints(page, tmp_path):
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri())
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
