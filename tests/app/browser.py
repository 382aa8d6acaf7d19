"""The app in the system's Chromium, as a visitor has it."""

from __future__ import annotations

import shutil


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 300_000  # milliseconds: a machine may have other work


def opened(browser, address, **settings):
    """A page of a visitor of its own, and the addresses elsewhere that it asked for."""
    page = browser.new_context(**{"viewport": {"width": 1280, "height": 1000}} | settings).new_page()
    page.set_default_timeout(PATIENCE)
    elsewhere = []

    def asked(request):
        if not request.url.startswith((address, "data:", "blob:")):
            elsewhere.append(request.url)

    page.on("request", asked)
    page.goto(address)
    page.wait_for_selector("#attack")
    return page, elsewhere


def upload(page, file):
    """Hand a picture in, and wait until the page shows it."""
    page.set_input_files("#image input[type=file]", str(file))
    page.wait_for_selector("#image img")


def state(page):
    """The line that says how far things are."""
    return " ".join(page.inner_text("#state").split())


def wait_for(page, words):
    """Until the line says so."""
    page.wait_for_function("words => document.querySelector('#state').innerText.includes(words)", arg=words)


def set_steps(page, steps):
    """By the number beside the slider."""
    page.fill("#steps input[type=number]", str(steps))
    page.press("#steps input[type=number]", "Tab")
