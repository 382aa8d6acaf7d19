"""The documentation site: every page is found, every public name explained, every link leads somewhere."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

import hf_robust_vision
from tests.app.browser import CHROMIUM


ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
FENCE = re.compile(r"^(`{3,})[^\n]*\n.*?^\1\n", re.MULTILINE | re.DOTALL)


def named(page):
    return str(page.relative_to(ROOT))


def prose(page):
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """What a link may name behind `#`: the headings, as GitHub and the site spell them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-") for title in titles}


def test_every_page_is_in_the_contents_once():
    listed = Counter()
    for page in PAGES:
        for block in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            names = [re.sub(r"^.*<(.+)>$", r"\1", entry) for entry in entries]
            listed.update((page.parent / name).relative_to(DOCS).as_posix() for name in names)
    pages = [page.relative_to(DOCS).with_suffix("").as_posix() for page in [*PAGES, *NOTEBOOKS]]
    assert listed == Counter(pages) - Counter(["index"])


def test_every_public_name_is_in_the_reference_once():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = Counter(re.findall(r"^\.\. auto\w+:: hf_robust_vision\.(\w+)$", pages, re.MULTILINE))
    assert listed == Counter(hf_robust_vision.__all__)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=named)
def test_pictures_say_what_they_show(page):
    assert not re.findall(r"!\[\s*\]\([^)]*\)", prose(page))
    assert not [tag for tag in re.findall(r"<img[^>]*>", prose(page)) if not re.search(r'alt="[^"]+"', tag)]


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=named)
def test_links_lead_somewhere_inside(page):
    """The site holds `docs/` alone, so that a link out of it would be dead there."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        inside = target.is_file() and target.is_relative_to(DOCS)
        assert page.parent == ROOT or inside, f"{link} is no file in docs/"
        assert not anchor or anchor in anchors(target), f"no heading for {link}"


def test_glossary_is_sorted():
    terms = re.findall(
        r"^(\S.*)$", re.search(r"\{glossary\}\n(.*)```", (DOCS / "glossary.md").read_text(), re.S)[1], re.M
    )
    assert terms == sorted(terms, key=str.lower)


class Page(HTMLParser):
    """Links, anchors and pictures of a built page, and what it fetches from elsewhere."""

    def __init__(self, file):
        super().__init__()
        self.file, self.links, self.anchors, self.pictures, self.foreign = file, set(), set(), [], []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.anchors |= {values.get("id")}
        if tag == "a" and values.get("href") and "://" not in values["href"]:
            file, _, anchor = unquote(values["href"]).partition("#")
            self.links.add(((self.file.parent / file).resolve() if file else self.file, anchor))
        if tag == "img":
            self.pictures.append(values)
        address = values.get("src") or (values.get("href") if tag == "link" else None)
        if address and "://" in address:
            self.foreign.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built from a copy of `docs/`, beside which nothing lies."""
    for name in ("sphinx", "myst_parser", "furo", "sphinx_copybutton"):
        pytest.importorskip(name)
    place = tmp_path_factory.mktemp("site")
    shutil.copytree(DOCS, place / "docs")
    words = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", str(place / "docs"), str(place / "html")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {file: Page(file) for file in (place / "html").resolve().rglob("*.html") if "_downloads" not in file.parts}


@pytest.mark.slow
def test_the_site_is_whole(site):
    for page in site.values():
        for file, anchor in page.links:
            assert file.exists(), f"{page.file}: {file}"
            assert not anchor or file not in site or anchor in site[file].anchors, f"{page.file}: {file}#{anchor}"
        assert all(picture.get("alt") for picture in page.pictures), page.file
        assert not page.foreign, f"{page.file} fetches {page.foreign}"


@pytest.mark.slow
def test_every_page_is_two_clicks_away(site):
    (top,) = {file.parent for file in site if file.name == "search.html"}
    reached = {top / "index.html"}
    for _ in range(2):
        reached |= {file for page in reached & set(site) for file, _ in site[page].links}
    pages = {(top / page.relative_to(DOCS)).with_suffix(".html") for page in [*PAGES, *NOTEBOOKS]}
    assert pages <= reached
    assert "perturb" in (top / "searchindex.js").read_text()


@pytest.mark.slow
def test_notebooks_are_shown_with_what_they_gave(site):
    for notebook in NOTEBOOKS:
        (file,) = (file for file in site if file.stem == notebook.stem)
        code = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
        outputs = [output for cell in code for output in cell["outputs"]]
        shown = html.unescape(file.read_text())
        printed = [
            line for one in outputs if one.get("name") == "stdout" for line in "".join(one["text"]).splitlines()
        ]
        assert printed
        assert all(line.strip() in shown for line in printed)
        pictures = [picture["src"] for picture in site[file].pictures if picture["src"].startswith("data:image/png")]
        assert len(pictures) == sum("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_the_reference_has_the_docstrings(site):
    """With a link from one public name to another, and every added argument with its help."""
    text = {file.name: file.read_text() for file in site}
    assert "the iterate of the highest" in text["attacks.html"]
    assert 'href="#hf_robust_vision.pgd"' in text["attacks.html"]
    assert (
        '<code class="docutils literal notranslate"><span class="pre">attack_eps</span></code>'
        in text["training.html"]
    )


LOOK = """element => {
    const shown = [getComputedStyle(element).color];
    for (let one = element; one; one = one.parentElement) shown.push(getComputedStyle(one).backgroundColor);
    return shown;
}"""


def luminance(colour):
    """Of `rgb(...)`, relative, from 0 to 1 (WCAG 2)."""
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_look_right(site, scheme, tmp_path):
    """Four pages in a real browser, wide and on a phone; `--basetemp FOLDER` keeps their pictures."""
    driver = pytest.importorskip("playwright.sync_api", reason="no playwright")
    (top,) = {file.parent for file in site if file.name == "search.html"}
    with driver.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        seen = set()
        for width in (1280, 400):
            page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
            for name in ("index", "quickstart", "how-to-harden-a-vlm", "api/attacks"):
                page.goto((top / f"{name}.html").as_uri())
                page.screenshot(path=tmp_path / f"{name.replace('/', '-')}-{scheme}-{width}.png")
                assert page.evaluate("document.documentElement.scrollWidth") <= width, name
                for selector in ("article h1", "article p", "article a.reference", "article pre span"):
                    if page.locator(selector).count() == 0:
                        continue
                    seen.add(selector)
                    colour, *behind = page.eval_on_selector(selector, LOOK)
                    ground = next(one for one in behind if one not in ("rgba(0, 0, 0, 0)", "transparent"))
                    dark, light = sorted((luminance(colour), luminance(ground)))
                    assert (light + 0.05) / (dark + 0.05) >= 4.5, (name, selector, colour, ground)
                    assert (luminance(ground) < luminance(colour)) == (scheme == "dark"), (name, selector)
        assert len(seen) == 4
        browser.close()
