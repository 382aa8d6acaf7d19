"""Pictures of the app for README and docs: `docs/results/app.png` after an attack, `app-narrow.png` before one.

    python recipes/research/app_pictures.py --docs docs

It needs the extra `app`, playwright, and a Chromium of the system.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from hf_robust_vision.app.serve import serve


def small(png: bytes, file: Path) -> None:
    """Without an alpha channel, in true colours: a palette would draw another perturbation than the one that was found."""
    Image.open(io.BytesIO(png)).convert("RGB").save(file, optimize=True)


def main() -> None:
    """Serve, attack the first example, look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, required=True, help="folder of the docs")
    results = parser.parse_args().docs / "results"
    app = serve(wait=False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        wide = browser.new_context(viewport={"width": 1180, "height": 900}).new_page()
        wide.set_default_timeout(600_000)
        wide.goto(app.local_url)
        wide.locator("#examples button, #examples .gallery-item").first.click()
        wide.wait_for_selector("#image img")
        wide.click("#attack")
        wide.wait_for_function("() => document.querySelector('#state').innerText.includes('Done.')")
        wide.wait_for_timeout(2000)
        small(wide.screenshot(full_page=True), results / "app.png")
        phone = {"width": 400, "height": 860}
        narrow = browser.new_context(viewport=phone, color_scheme="dark").new_page()
        narrow.goto(app.local_url)
        narrow.wait_for_selector("#attack")
        narrow.wait_for_timeout(2000)
        small(narrow.screenshot(), results / "app-narrow.png")
    app.close()


if __name__ == "__main__":
    main()
