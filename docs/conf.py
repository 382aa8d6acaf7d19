"""The documentation site: `sphinx-build -W docs outputs/site`, with the package and its extra `docs` installed."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

from myst_parser.parsers.sphinx_ import MystParser
from transformers import TrainingArguments

from hf_robust_vision import __version__ as release


project = "hf-robust-vision"
version = release
project_copyright = "the authors of hf-robust-vision, Apache-2.0"
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 3
default_role = "py:obj"  # a public name in a docstring becomes a link, anything else stays code

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False
autodoc_preserve_defaults = True
napoleon_custom_sections = [("Reference", "notes_style"), ("Relations", "notes_style")]
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"hf-robust-vision {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp, .go"


class NotebookParser(MystParser):
    """A notebook with the outputs that it was saved with, as a page; nothing is run."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: Any) -> None:
        """Cell by cell."""
        cells = json.loads(inputstring)["cells"]
        super().parse("\n\n".join(part for cell in cells for part in parts_of(cell)), document)


def parts_of(cell: Any) -> list[str]:
    """The Markdown of a cell and of what it gave."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    parts = [f"```python\n{source}\n```"]
    for output in cell["outputs"]:
        data = output.get("data", {})
        text = "".join(output.get("text", data.get("text/plain", ""))).rstrip()
        if "image/png" in data:
            parts.append(f"![{cell['metadata']['alt']}](data:image/png;base64,{''.join(data['image/png']).strip()})")
        elif text and output.get("name") != "stderr":
            parts.append(f"```text\n{text}\n```")
    return parts


def without_all_fields(app: Any, what: str, name: str, obj: Any, *_: Any) -> tuple[str, str] | None:
    """Arguments are some hundred fields of transformers: what a class adds is listed instead."""
    return ("", "") if what == "class" and issubclass(obj, TrainingArguments) else None


def with_own_fields(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Each field that a class of arguments adds, with its default and its help."""
    if what != "class" or not issubclass(obj, TrainingArguments):
        return
    own = inspect.get_annotations(obj)
    for field in dataclasses.fields(obj):
        if field.name in own and "help" in field.metadata:
            lines += ["", f"``{field.name}`` = ``{field.default!r}``", f"    {field.metadata['help']}"]


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.connect("autodoc-process-signature", without_all_fields)
    app.connect("autodoc-process-docstring", with_own_fields)
