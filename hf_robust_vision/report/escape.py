"""Text from outside (names, prompts, answers), made harmless for each language that it is written into.

HTML is not here: the page's template and the curve escape by themselves.
"""

from __future__ import annotations

import json
import re
from typing import Any


# Letters of many languages and emoji are joined by these two, which Python calls unprintable.
_JOINERS = "\u200c\u200d"
# Where CommonMark and GitHub read markup; an underscore inside a word is none.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")


class Verbatim(str):
    """Markdown that is meant as such."""

    __slots__ = ()


def one_line(text: Any) -> str:
    """One line of printable characters; others as Python writes them in a text."""
    return _printable(" ".join(str(text).split()))


def markdown(text: Any) -> str:
    """Text that shows as it is in a Markdown page or in a cell of a table."""
    if isinstance(text, Verbatim):
        return text
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\g<0>", line)


def markdown_code(text: Any) -> Verbatim:
    """Text as a code span of Markdown."""
    line = one_line(text)
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return Verbatim(f"{fence}{space}{line}{space}{fence}")


def python(text: str) -> Verbatim:
    """Text as a literal of Python that holds no comment of HTML either."""
    return Verbatim(_printable(json.dumps(text, ensure_ascii=False)).replace("<!--", "<\\x21--"))


def _printable(text: str) -> str:
    return "".join(
        char if char.isprintable() or char in _JOINERS else char.encode("unicode_escape").decode() for char in text
    )
