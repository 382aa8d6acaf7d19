"""Names from outside stay names: in Markdown, in HTML, in Python and on a terminal (findings-reliability 4 and 13)."""

from __future__ import annotations

import ast

import pytest

from hf_robust_vision.report.escape import Verbatim, markdown, markdown_code, one_line, python


HOSTILE = (
    'cat"]; open("x", "w").write("x"); y = ["',
    '15" monitor',
    "15' monitor",
    "back\\slash\\",
    '\\"',
    "two\nlines",
    "\n# Title\n",
    "\r\n\tx",
    "a|b",
    "`code`",
    "```\nimport os\n```",
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "[here](http://example.org)",
    "![](http://example.org/x.png)",
    "**bold** _it_ ~~no~~ $x$",
    "<!-- usage -->",
    "<!-- /usage -->",
    "{0.__class__}",
    "{{ name }} {% x %}",
    "%s %n",
    "---\nlicense: mit\n---",
    "\x1b[2J\x07",
    "\x00",
    "\u202edetrever",
    "\u2028line\u2029",
    "undecodable \udcff",
    "kräuter 日本 \U0001f600",
    "x" * 5000,
)


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_each_language(name):
    assert ast.literal_eval(python(name)) == name
    assert "<!--" not in python(name)
    for text in (one_line(name), markdown(name), markdown_code(name), python(name)):
        assert text.isprintable()
        text.encode()
    cell = markdown(name)
    assert not set(cell) & set("<>")
    bare = cell.replace("\\\\", "")
    assert all(bare[place - 1] == "\\" for place, char in enumerate(bare) if char in "`|[]*~$")
    span = markdown_code(name)
    fence = span[: len(span) - len(span.lstrip("`"))]
    assert span.endswith(fence)
    assert fence not in span[len(fence) : -len(fence)].replace(f" {fence}`", "")


def test_what_is_harmless_stays_readable():
    assert markdown("train_station, kräuter & 日本: 62.5 % (a-b)") == "train_station, kräuter &amp; 日本: 62.5 % (a-b)"
    assert markdown(3.5) == "3.5"
    assert python("kräuter") == '"kräuter"'
    assert one_line("\U0001f468\u200d\U0001f469") == "\U0001f468\u200d\U0001f469"  # a joined emoji
    assert markdown(Verbatim("`a`")) == "`a`"
