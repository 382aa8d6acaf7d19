"""What is released: the wheel holds all that the demo needs, and nothing that measures us; the sdist holds no photos."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from hf_robust_vision.evaluation.results import load_results
from hf_robust_vision.pipeline.twins import TOWER_FILE, TWINS


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
    for twin in TWINS.values():
        assert any(name.endswith(f"/{twin}/{TOWER_FILE}") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"hf_robust_vision"}
    assert "hf_robust_vision/py.typed" in names
    assert wheel.stat().st_size < 15e6


@pytest.mark.slow
def test_the_sdist_and_what_pypi_would_say(wheel, tmp_path):
    for name in ("build", "twine"):
        pytest.importorskip(name)
    words = [sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "docs/conf.py", "recipes/sim_clip.py"} <= names
    assert {"tests/cli/test_wheel.py", "SECURITY.md", ".ci/run", ".github/workflows/ci.yml"} <= names
    assert any(name.startswith(".agents/skills/") and name.endswith("/SKILL.md") for name in names)
    assert not [name for name in names if name.startswith("recipes/research/photo_clip")]
    pictures = {name for name in names if name.endswith((".png", ".jpg", ".jpeg", ".webp", ".gif"))}
    assert {name.rsplit("/", 1)[0] for name in pictures} <= {"docs/results"}
    assert not [name for name in pictures if "photo" in name]
    assert sdist.stat().st_size < 15e6
    check = [sys.executable, "-m", "twine", "check", "--strict", str(wheel), str(sdist)]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


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
    doctor = subprocess.run(
        [place / "bin" / "hf-robust-vision", "doctor"],
        env=environment | {"HF_HUB_OFFLINE": "1"}, cwd=empty, capture_output=True, text=True,
    )  # fmt: skip
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    assert doctor.stdout.rstrip().endswith("all that the package needs is here")
