"""Pages, cards and curves are drawn by Jinja, and each template escapes what it shows for its own language."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import jinja2

from hf_robust_vision.evaluation.paired import points

from .escape import markdown, markdown_code, python
from .tables import markdown_table, percent


@lru_cache
def template(name: str) -> jinja2.Template:
    """A file of `pages/`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=not name.endswith(".md"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    if name.endswith(".md"):
        environment.finalize = markdown
    environment.filters |= {"percent": percent, "points": points, "px": "{:.1f}".format}
    environment.filters |= {"code": markdown_code, "python": python}
    environment.globals["table"] = markdown_table
    return environment.get_template(name)
