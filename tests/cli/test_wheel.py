"""The wheel alone: configs and demo checkpoints are in it, what measures us is not, and the demo runs from it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from hf_robust_vision.evaluation.results import load_results


ROOT = Path(__file__).parents[2]
CONFIGS = {file.name for file in (ROOT / "hf_robust_vision" / "configs").glob("*.yaml")}
PAGES = {file.name for file in (ROOT / "hf_robust_vision" / "report" / "pages").iterdir()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    place = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(place), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = place.glob("*.whl")
    return file


@pytest.mark.slow
def test_what_is_in_it(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {Path(name).name for name in names if "/configs/" in name and name.endswith(".yaml")} == CONFIGS
    assert {Path(name).name for name in names if "/report/pages/" in name} == PAGES
    for model in ("demo-clip", "demo-llava", "demo-smolvlm"):
        assert any(f"/{model}/" in name and name.endswith(".safetensors") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hf_robust_vision"}


@pytest.mark.slow
def test_the_demo_runs_from_it(wheel, tmp_path):
    """In an empty folder, in an environment of its own that borrows the dependencies of this one."""
    pytest.importorskip("easy_vqa")
    place = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    # Not `addsitedir`: it would also read the file that makes this checkout importable.
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [
        "harden",
        "sim-clip",
        "--max_steps",
        "2",
        "--test_protocol",
        "quick",
        "--test_steps",
        "1",
        "--max_test_samples",
        "4",
    ]
    done = subprocess.run(
        [place / "bin" / "hf-robust-vision", *words, "--use_cpu", "true"],
        env=environment | {"HF_HUB_OFFLINE": "1"}, cwd=empty, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    output = empty / "outputs" / "sim-clip-demo"
    assert "output: outputs/sim-clip-demo" in done.stdout
    after = load_results(output)[-1]
    assert (after.training["feature"], after.training["form"]) == ("both", "frozen")
    assert (after.training["steps"], after.training["eps"]) == (2, 8 / 255)
    found = subprocess.run(
        [python, "-c", "import hf_robust_vision; print(hf_robust_vision.__file__)"],
        env=environment, cwd=empty, capture_output=True, text=True,
    ).stdout  # fmt: skip
    assert found.startswith(str(place)), "the checkout was imported, not the wheel"
