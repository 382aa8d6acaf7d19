"""What the page does with what it is handed, without a browser, and what its server lets through."""

from __future__ import annotations

import json
import urllib.error
import urllib.request

import pytest

from hf_robust_vision.data.demo import demo_rows


gr = pytest.importorskip("gradio", reason='no gradio: pip install "hf-robust-vision[app]"')
pytest.importorskip("easy_vqa")

from hf_robust_vision.app.limits import LIMITS  # noqa: E402
from hf_robust_vision.app.page import DEMO, OWN, QUESTION, _Page, make_page  # noqa: E402
from hf_robust_vision.app.serve import serve  # noqa: E402


@pytest.fixture(scope="module")
def file():
    return demo_rows("test")[0]["image"]


@pytest.fixture
def page():
    page = _Page(DEMO, True, LIMITS)
    page.build()
    return page


def handed(picture, **other):
    values = {
        "name": str(DEMO[0]),
        "original": "",
        "hardened": "",
        "file": picture,
        "text": QUESTION,
        "eps": 8,
        "steps": 5,
    }
    return list((values | other).values())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"file": None}, "there is no image"),
        ({"text": ""}, "there is no text"),
        ({"text": "a" * 10_000}, "10,000 characters"),
        ({"eps": 255}, "eps must be a number from 1 to 32"),
        ({"steps": 10**9}, "steps must be a number from 5 to 100"),
        ({"name": "/etc"}, "choose one of the models of the list"),
        ({"name": OWN}, "name both models"),
        (
            {"name": OWN, "original": "/etc", "hardened": "/etc"},
            "/etc is neither a model folder nor a model of the Hub",
        ),
        ({"name": OWN, "original": "demo-clip", "hardened": "demo-clip", "text": "one"}, "name at least two"),
    ],
)
def test_what_can_not_be_attacked_ends_in_one_line_with_the_buttons_ready(page, file, other, words):
    *_, last = page.run(*handed(file, **other))
    assert words in last[page.state]["value"]
    assert "Traceback" not in last[page.state]["value"]
    assert last[page.attack] == gr.update(interactive=True)
    assert last[page.cancel] == gr.update(interactive=False)


def test_models_of_ones_own_are_only_for_ones_own_people(file):
    page = _Page(DEMO, False, LIMITS)
    page.build()
    *_, last = page.run(*handed(file, name=OWN, original="demo-clip", hardened="demo-clip"))
    assert "choose one of the models of the list" in last[page.state]["value"]
    assert OWN not in [value for _, value in page.pair.choices]


def test_an_attack_shows_both_models_one_after_the_other(page, file):
    shown = list(page.run(*handed(file)))
    first, second = (
        next(place for place, news in enumerate(shown) if page.answers[side] in news and news[page.answers[side]])
        for side in (0, 1)
    )
    assert 0 < first < second < len(shown) - 1
    assert "Done." in shown[-1][page.state]["value"]
    assert "<svg" in shown[-1][page.curve]
    assert 'for model in ("demo-llava", "demo-llava-hardened")' in shown[-1][page.call]
    assert [news[page.attacked[0]].size for news in shown if page.attacked[0] in news and news[page.attacked[0]]] == [
        (64, 64)
    ]


def test_a_text_of_a_visitor_is_shown_as_text(page):
    from hf_robust_vision.app.show import call, progress, state

    bad = '<script>alert(1)</script>"""\n'
    assert "<script>" not in state(bad) + progress(0.5, bad)
    compile(call(["m", "n"], bad, 8 / 255, 5), "page", "exec")
    compile(call(["m", "n"], [bad, '"'], 8 / 255, 5), "page", "exec")


def test_nothing_is_counted_and_nothing_is_kept(page):
    config = page.blocks.get_config_file()
    assert page.blocks.analytics_enabled is False
    assert all(
        one.get("api_visibility") != "public" for one in config["dependencies"] if one["targets"][0][1] == "click"
    )


@pytest.fixture(scope="module")
def address():
    app = serve(wait=False)
    yield app.local_url.rstrip("/")
    app.close()


def test_the_browser_is_told_to_load_nothing_from_elsewhere(address):
    with urllib.request.urlopen(address) as answer:
        policy = answer.headers["content-security-policy"]
        page = answer.read().decode()
    assert "default-src 'self'" in policy
    assert "http:" not in policy
    assert "fonts.googleapis" not in page


def test_a_file_that_is_too_large_is_refused_while_it_comes(address):
    body = b"--b\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n"
    body += b"0" * int(LIMITS.megabytes * 1e6 + 1) + b"\r\n--b--\r\n"
    request = urllib.request.Request(
        f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=b"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code in (400, 413)


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/a.png", "/etc/hostname"])
def test_an_address_or_a_file_of_the_server_is_no_upload(address, path):
    """Handed to the queue by hand, as no page does."""
    with urllib.request.urlopen(f"{address}/config") as answer:
        config = json.load(answer)
    (run,) = [one["id"] for one in config["dependencies"] if len(one["inputs"]) == 7]
    data = handed({"path": path, "url": path, "meta": {"_type": "gradio.FileData"}})
    post(f"{address}/gradio_api/queue/join", {"data": data, "fn_index": run, "session_hash": "tester"})
    said = ""
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=tester", timeout=120) as stream:
        for line in stream:
            said += line.decode()
            if "process_completed" in said or "close_stream" in said:
                break
    completed = next(json.loads(line[6:]) for line in said.splitlines() if "process_completed" in line)
    assert completed["success"] is False


def post(address, values):
    request = urllib.request.Request(address, json.dumps(values).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_the_page_needs_no_demo_data(monkeypatch):
    def missing(split):
        raise ModuleNotFoundError("no easy-vqa")

    monkeypatch.setattr("hf_robust_vision.app.page.demo_rows", missing)
    assert make_page() is not None
