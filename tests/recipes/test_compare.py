"""The comparison on a budget of nothing: it runs, resumes, and measures both groups."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_compare_runs_and_goes_on_from_what_is_there(tmp_path):
    pytest.importorskip("easy_vqa")
    command = [sys.executable, str(ROOT / "recipes" / "compare.py"), "--methods", "undefended,tecoa,tima"]
    command += ["--seeds", "0,1", "--steps", "1", "--batch_size", "2", "--images", "2", "--eval_steps", "1"]
    command += ["--output_dir", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("robustness.json")}
    assert len(written) == 5
    content = json.loads((tmp_path / "docs" / "results" / "compare.json").read_text())
    assert {(row["method"], row["group"]) for row in content["rows"]} == {
        (method, group) for method in ("undefended", "tecoa", "tima") for group in ("seen", "unseen")
    }
    assert {row["other"] for row in content["paired"]} == {"TeCoA"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in written} == written
