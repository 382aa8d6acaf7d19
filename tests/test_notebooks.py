"""The notebooks run from their first cell to their last, and show what a run of them gave."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest


NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs" / "notebooks").glob("*.ipynb"))
SHORT = {"UPDATES": 2, "IMAGES": 4, "QUESTIONS": 2, "STEPS": 1}  # in place of what their first cell says


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path, monkeypatch):
    """Short: with the settings of the cell that is tagged "parameters" made small."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for cell in cells(path):
        code = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", []):
            names = re.findall(r"^(\w+) = ", code, re.MULTILINE)
            code = "\n".join(f"{name} = {SHORT[name]}" for name in names)
        exec(compile(code, str(path), "exec"), namespace)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_those_of_one_run(path):
    code = cells(path)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert all(cell["metadata"].get("alt") for cell in code if "image/png" in json.dumps(cell["outputs"]))
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    assert not re.search(r"/tmp/|/home/|/root/|it/s\]", text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_to_pages(path):
    links = re.findall(
        r"\]\(([^)#\s]+)[^)]*\)", "\n".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    )
    assert links
    assert all((path.parent / link).is_file() for link in links if "://" not in link)
